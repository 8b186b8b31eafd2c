"""Training of the toy weights: tiny models of the hub's architectures, on scenes that `toyworld.render` draws."""
