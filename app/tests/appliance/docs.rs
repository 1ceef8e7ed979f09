//! docs/rpc.md says what the binary says.

use std::fs;
use std::path::Path;

use crate::common::ringstone;

#[test]
fn the_reference_page_is_current() {
    let output = ringstone().args(["rpc", "--markdown"]).output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/rpc.md");
    let written = fs::read_to_string(page).unwrap_or_default();
    assert!(
        text == written,
        "docs/rpc.md is not what the method table says; write it anew: cargo run -- rpc --markdown > docs/rpc.md"
    );
    assert!(text.contains("\n### nvmf_create_subsystem\n") && text.contains("\n### bdev_uring_create\n"));
}
