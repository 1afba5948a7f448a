"""The progress bar: one line on the terminal while a fit runs, nothing when the output is not one."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator

from tqdm import tqdm

from pyro_em.loop import Callback, Step


@contextlib.contextmanager
def progress_bar(progress: bool | None, algorithm: str, max_iter: int) -> Iterator[tuple[Callback, ...]]:
    """The callback that moves the bar, or none; `progress=None` shows one where stderr is a terminal."""
    show = sys.stderr.isatty() if progress is None else progress
    if not show:
        yield ()
        return
    with tqdm(total=max_iter, desc=algorithm, leave=False) as bar:

        def tick(step: Step) -> None:
            bar.n = step.iteration
            score = "" if math.isnan(step.score) else f", score {step.score:.1e}"
            bar.set_postfix_str(f"objective {step.objective:.6g}{score}", refresh=False)
            bar.update(0)

        yield (tick,)
