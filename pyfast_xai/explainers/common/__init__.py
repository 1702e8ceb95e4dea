"""Shared parts of the explainers: arguments, targets, layers, gradient passes and perturbed scores."""
