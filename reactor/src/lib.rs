//! Pinned, polled, adaptive reactor runtime with its seams to the outside world.
