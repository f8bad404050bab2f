"""Priors, likelihoods, posterior families, objectives and their fitting, in torch alone."""
