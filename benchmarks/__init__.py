"""How fast, against whom, and where it loses.

    python -m benchmarks.run            every workload, then the table (minutes)
    python -m benchmarks.run A1 D       some of them
    python -m benchmarks.report         the table of what benchmarks/results/ holds
    python -m benchmarks.draw           the same as a picture

Everything of ours goes through `pyro_em.fit` on the models in models/. Peers are installed by the extra
`bench` and never imported by the package. What is measured, and how, is said in harness.py.
"""
