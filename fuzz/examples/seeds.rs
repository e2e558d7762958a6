//! Writes the inputs that the fuzzer starts from: valid files, whole and as text.

#[path = "../../tests/common/mod.rs"]
mod common;

use std::fs;
use std::path::Path;

use roptim::checkpoint::{Tree, to_bytes};

fn main() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/read");
    fs::create_dir_all(&corpus).unwrap();
    let Tree::Dict(items) = common::sample() else { panic!("a dict") };
    let parts = items.into_iter().map(|item| Tree::Dict(vec![item]));
    for (i, tree) in parts.chain([common::sample(), Tree::None, common::floats(&[1.0, 2.0])]).enumerate() {
        let file = to_bytes(&tree).unwrap();
        let data = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let text = [&[1], file[8..data].trim_ascii_end(), &[0], &file[data..]].concat();
        fs::write(corpus.join(format!("file-{i}")), [&[0], file.as_slice()].concat()).unwrap();
        fs::write(corpus.join(format!("text-{i}")), text).unwrap();
    }
}
