//! Pluggable block devices on reactors.
