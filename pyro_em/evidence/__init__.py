"""log Z and its gradient: the evidence of a model and the posterior weights of its factors."""
