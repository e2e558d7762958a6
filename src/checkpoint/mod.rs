//! Files: one safe container for every tree of values.
//!
//! A file is a [safetensors](https://github.com/huggingface/safetensors) file, which any tool of that
//! format opens:
//!
//! ```text
//! 8 bytes   N, the header's length, little-endian
//! N bytes   JSON, padded with spaces so that the data starts at a multiple of 64
//!           {"__metadata__":{"roptim":"…"},"state[0]:exp_avg":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},…}
//! the rest  the tensors' elements, without holes, the widest types first, then by name
//! ```
//!
//! The one metadata value is JSON itself: `{"format":1,"checksum":"…","tree":…}`, where `tree` is the
//! structure with its exact types and a reference to each tensor, and `checksum` the XXH3 of 128 bits
//! over the whole file with the checksum's own digits as zeros. `docs/checkpoint-format.md` has it in
//! full.
//!
//! Each tree has exactly one file: the reader refuses any other bytes. It is written for hostile input:
//! it never panics, allocates nothing on a header's word alone, and says what is wrong. The checksum finds
//! damage; it is no signature. There is no pickle on any path.
//!
//! [`save`] writes a temporary file beside the target, flushes it to disk, renames it, and flushes the
//! directory: a crash leaves the old file or the new one. A [`Series`] is a directory of such files, one for
//! each saved step of a run. The file system is a trait ([`Disk`]), so that tests can cut its power.
//! [`StateDict::into_tree`](crate::StateDict::into_tree) and [`StateDict::from_tree`](crate::StateDict::from_tree) connect optimizers.
//!
//! A [`Tree`] is also serde's: in human-readable formats such as JSON it is the same structure with the tensors'
//! numbers in it, in binary ones the bytes of its file.
//!
//! ```
//! use roptim::checkpoint::{DataType, TensorData, Tree, load, save};
//!
//! let weights: Vec<u8> = [1.0f32, 2.0].iter().flat_map(|x| x.to_le_bytes()).collect();
//! let weights = TensorData::new(DataType::Float32, vec![2], weights)?;
//! let tree = Tree::dict([("epoch", Tree::Int(3)), ("W", Tree::Tensor(weights))]);
//! # let directory = tempfile::tempdir().unwrap();
//! # let path = directory.path().join("model.ckpt");
//! save(&path, &tree)?;
//! assert_eq!(load(&path)?, tree);
//! # Ok::<(), roptim::Error>(())
//! ```

mod commit;
mod disk;
mod json;
mod path;
mod read;
mod serial;
mod series;
mod state;
mod tree;
mod write;

pub use commit::Progress;
pub use disk::{Disk, Kind, OsDirectory, OsDisk};
pub use read::{Examined, examine, from_bytes, load, load_from};
pub use series::{Saved, Series};
pub use tree::{Bytes, DataType, Key, TensorData, Tree};
pub use write::{save, save_to, to_bytes, write_file};

/// Version of the file format that this library writes; it reads this one.
pub const FORMAT: u32 = 1;

/// Lists, tuples and dicts inside each other. A level takes at most two levels of JSON, and the JSON
/// reader's stack is good for 127.
pub const MAX_DEPTH: usize = 60;

/// Bytes of the header. Some memory of the reader is in proportion to the header.
pub const MAX_HEADER_LEN: usize = 16 << 20;

/// Axes of a stored array; a complex128 array uses one for its halves.
pub const MAX_RANK: usize = 32;

/// Bytes of a tensor's name, which is its place in the tree.
pub const MAX_NAME_LEN: usize = 4096;

/// Decimal digits of an integer beyond 64 bits: enough for 4096 bits.
pub const MAX_INT_DIGITS: usize = 1234;

/// The data starts at a multiple of this.
const ALIGNMENT: usize = 64;

/// How every file starts, up to the digits of the checksum.
const OPENING: &str = r#"{"__metadata__":{"roptim":"{\"format\":1,\"checksum\":\""#;

/// Digits of the checksum.
const CHECKSUM_LEN: usize = 32;

/// Where the checksum's digits are.
const CHECKSUM_AT: std::ops::Range<usize> = 8 + OPENING.len()..8 + OPENING.len() + CHECKSUM_LEN;

/// The digits while the checksum is computed.
const CHECKSUM_BLANK: [u8; CHECKSUM_LEN] = [b'0'; CHECKSUM_LEN];

/// The checksum of a file while it is read or written.
struct Checksum {
    hash: xxhash_rust::xxh3::Xxh3,
}

impl Checksum {
    /// Of all before the data, whatever stands in the place of the digits.
    fn of_head(head: &[u8]) -> Self {
        let mut hash = xxhash_rust::xxh3::Xxh3::new();
        hash.update(&head[..CHECKSUM_AT.start]);
        hash.update(&CHECKSUM_BLANK);
        hash.update(&head[CHECKSUM_AT.end..]);
        Self { hash }
    }

    /// Goes on with these bytes of the data.
    fn update(&mut self, data: &[u8]) {
        self.hash.update(data);
    }

    fn digits(&self) -> String {
        format!("{:032x}", self.hash.digest128())
    }
}
