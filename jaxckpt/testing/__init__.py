"""Fakes and harnesses for the tests of jaxckpt and of its users; no layer imports them."""
