"""The demo: a real model out of a package, our own instruction data, and the whole method in ten minutes."""
