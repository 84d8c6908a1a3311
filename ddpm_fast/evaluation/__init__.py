"""How good are the samples: a classifier trained on real images, and distances in its features."""
