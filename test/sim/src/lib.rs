//! Deterministic simulator: production reactors, bdevs and target over a seeded world.
