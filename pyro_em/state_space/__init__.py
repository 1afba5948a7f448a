"""Linear-Gaussian chains: filters, smoothers and their moments. Knows no model and no site."""
