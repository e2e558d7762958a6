//! What the tests of files share: sample trees, and the seal that makes a changed file pass the checksum.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

use std::ops::Range;

use roptim::ErrorKind;
use roptim::checkpoint::{DataType, Key, TensorData, Tree, from_bytes};

pub fn tensor(dtype: DataType, shape: &[usize], bytes: impl Into<Vec<u8>>) -> TensorData {
    TensorData::new(dtype, shape.to_vec(), bytes.into()).unwrap()
}

pub fn floats(values: &[f32]) -> Tree {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    Tree::Tensor(tensor(DataType::Float32, &[values.len()], bytes))
}

/// One of everything.
pub fn sample() -> Tree {
    let nan = f64::from_bits(0xfff8_0000_0000_1234);
    Tree::dict([
        ("none", Tree::None),
        ("flags", Tree::List(vec![Tree::Bool(true), Tree::Bool(false)])),
        ("ints", Tree::Tuple(vec![Tree::Int(i64::MIN), Tree::Int(-1), Tree::Int(i64::MAX), Tree::UInt(u64::MAX)])),
        ("floats", Tree::List([0.0, -0.0, 0.1, f64::NAN, nan, f64::INFINITY, -f64::INFINITY].map(Tree::Float).into())),
        ("big", Tree::List(vec![Tree::BigInt((1u128 << 64).to_string()), Tree::BigInt(i128::MIN.to_string())])),
        ("text", "a\"\\\n\u{1f600}".into()),
        ("nested", Tree::Dict(vec![(Key::Int(-5), Tree::Tuple(vec![])), (Key::from("-5"), Tree::dict([]))])),
        ("$tensor", Tree::dict([("#1", Tree::None), ("$", Tree::None), ("", floats(&[]))])),
        ("__metadata__", floats(&[1.5, f32::NAN])),
        ("a/b", Tree::Tensor(tensor(DataType::Bool, &[2, 1], [1, 0]))),
        ("scalar", Tree::Scalar(tensor(DataType::Float64, &[], 2.5f64.to_le_bytes()))),
        ("z0", Tree::Tensor(tensor(DataType::Complex128, &[], [7; 16]))),
        ("z1", Tree::Tensor(tensor(DataType::Complex64, &[1], [8; 8]))),
        ("half", Tree::Tensor(tensor(DataType::BFloat16, &[3, 0], []))),
    ])
}

const OPENING: &[u8] = br#"{"__metadata__":{"roptim":"{\"format\":1,\"checksum\":\""#;

/// Where the checksum's digits are.
pub const CHECKSUM_AT: Range<usize> = 8 + OPENING.len()..8 + OPENING.len() + 32;

/// Puts the right checksum where the format has it.
pub fn seal(file: &mut [u8]) {
    if file.len() < CHECKSUM_AT.end || !file[8..].starts_with(OPENING) {
        return;
    }
    file[CHECKSUM_AT].fill(b'0');
    let digits = format!("{:032x}", xxhash_rust::xxh3::xxh3_128(file));
    file[CHECKSUM_AT].copy_from_slice(digits.as_bytes());
}

/// A file with this header, padded, and whatever checksum it states.
pub fn unsealed(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    let mut header = header.as_ref().to_vec();
    header.resize((header.len() + 8).next_multiple_of(64) - 8, b' ');
    [&(header.len() as u64).to_le_bytes(), header.as_slice(), data].concat()
}

/// The same, sealed.
pub fn with_header(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    let mut file = unsealed(header, data);
    seal(&mut file);
    file
}

/// A sealed file with this text as its metadata's JSON and these tensor entries.
pub fn with_metadata(metadata: &str, entries: &str, data: &[u8]) -> Vec<u8> {
    let text = serde_json::to_string(metadata).unwrap();
    let comma = if entries.is_empty() { "" } else { "," };
    with_header(format!(r#"{{"__metadata__":{{"roptim":{text}}}{comma}{entries}}}"#), data)
}

/// A sealed file with this structure and these tensor entries.
pub fn forged(tree: &str, entries: &str, data: &[u8]) -> Vec<u8> {
    let blank = "0".repeat(CHECKSUM_AT.len());
    with_metadata(&format!(r#"{{"format":1,"checksum":"{blank}","tree":{tree}}}"#), entries, data)
}

/// The sentence that refuses a file.
pub fn refusal(file: &[u8]) -> String {
    let error = from_bytes(file).expect_err("the file is wrong");
    let later = error.to_string().contains("a later roptim wrote the file");
    assert_eq!(error.kind(), if later { ErrorKind::Newer } else { ErrorKind::File }, "{error}");
    error.to_string()
}
