"""Scripts: train a base, fit its caches, evaluate a bundle."""
