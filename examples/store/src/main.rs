//! `palisade-store`: the sample store in one binary. This file is its table of contents.
fn main() {}
