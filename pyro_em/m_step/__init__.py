"""argmax of E_q[log p(x,z|θ)] (+ log p(θ)): closed forms where they exist, numeric otherwise."""
