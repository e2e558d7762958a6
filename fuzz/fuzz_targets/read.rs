//! Whatever bytes a file has, reading them does not panic, and what is accepted writes back to the same bytes.
//!
//! The first byte of an input says what the rest is. Even: the file. Odd: a header's text, and behind the first zero
//! byte the data, of which a file with the right length, padding and checksum is made; the fuzzer could not guess those.
#![no_main]

#[path = "../../tests/common/mod.rs"]
mod common;

use libfuzzer_sys::fuzz_target;
use roptim::checkpoint::{from_bytes, to_bytes};

fuzz_target!(|input: &[u8]| {
    let Some((mode, rest)) = input.split_first() else { return };
    let file = match mode % 2 {
        0 => rest.to_vec(),
        _ => {
            let end = rest.iter().position(|&byte| byte == 0).unwrap_or(rest.len());
            common::with_header(&rest[..end], rest.get(end + 1..).unwrap_or_default())
        }
    };
    if let Ok(tree) = from_bytes(&file) {
        assert_eq!(to_bytes(&tree).unwrap(), file);
    }
});
