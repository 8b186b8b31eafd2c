"""The trainer: a recipe and a stream -> a trained subject model. `launch` starts the processes, `loop` is what each
runs."""
