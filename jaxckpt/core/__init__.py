"""The vocabulary of the library: errors, boxes, trees, array kinds, events. No I/O, threads or devices."""
