//! What damage and chance make of valid files: nothing is taken for something else, nothing makes the reader panic, and
//! no header gets more memory than its own length gives reason for.
//!
//! `ROPTIM_FULL_TESTS=1` runs the long forms; they are meant for a release build.

mod common;
#[path = "common/extent.rs"]
mod extent;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ops::Range;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};

use common::{floats, forged, refusal, sample, seal, tensor, with_header};
use extent::{is_brief, is_full};
use roptim::checkpoint::{DataType, Key, MAX_HEADER_LEN, Tree, from_bytes, to_bytes};
use roptim::{Dtype, ErrorKind, Optimizer, Options, ParamInfo, Result, TensorRef};

// ---- Memory --------------------------------------------------------------------------------------------

/// The system's allocator, which counts for each thread. A block that grows counts twice for a moment, as where it
/// has to move.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST_HELD: Cell<isize> = const { Cell::new(0) };
}

fn count(change: isize) {
    let held = HELD.get() + change;
    HELD.set(held);
    MOST_HELD.set(MOST_HELD.get().max(held));
}

// SAFETY: every block is the system allocator's own. Counting allocates nothing: the cells need neither
// initialization nor a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's duties are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's duties are the same.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The outcome, and the most bytes that this thread held while it was made.
fn measured<T>(work: impl FnOnce() -> T) -> (T, usize) {
    HELD.set(0);
    MOST_HELD.set(0);
    let outcome = work();
    (outcome, MOST_HELD.get() as usize)
}

/// Bytes that reading takes for each byte of the header at most. A header that is mostly one long list of `0,` comes
/// to this: 2 bytes are a value of 32 bytes, in a list that holds its old and its doubled room while it grows, beside
/// the header itself and the text of the tree.
const PER_HEADER_BYTE: usize = 50;
/// Bytes for the rest: a message, and a little for each of the at most 127 levels of JSON that are open at a time.
const CONSTANT: usize = 64 << 10;

/// How much memory reading a file may take. A length that the reader must refuse makes no header.
fn allowance(file: &[u8]) -> usize {
    let Some(start) = file.first_chunk::<8>() else { return CONSTANT };
    let held = file.len() - 8;
    match usize::try_from(u64::from_le_bytes(*start)) {
        Ok(header) if header <= held && header <= MAX_HEADER_LEN => {
            PER_HEADER_BYTE * header + (held - header) + CONSTANT
        }
        _ => CONSTANT,
    }
}

/// Reads a file within its allowance.
fn read(file: &[u8]) -> Result<Tree> {
    let (outcome, held) = measured(|| from_bytes(file));
    assert!(held <= allowance(file), "{held} bytes for a file of {}, with {}", file.len(), allowance(file));
    outcome
}

/// What is said to be large, in files that are small.
#[test]
fn claims_allocate_nothing() {
    let tensor = |shape: &str, end: u64| format!(r#"{{"dtype":"U8","shape":{shape},"data_offsets":[0,{end}]}}"#);
    let one = |entry: String| forged(r#"{"a":{"$tensor":"a"}}"#, &format!(r#""a":{entry}"#), &[0; 4]);
    let lengths = [1 << 10, 16 << 20, (16 << 20) + 1, 1 << 40, 1 << 63, u64::MAX];
    let files = lengths.map(|len: u64| [&len.to_le_bytes()[..], &[b' '; 500]].concat()).into_iter().chain([
        one(tensor("[1099511627776]", 1 << 40)),
        one(tensor("[1048576,1048576]", 1 << 40)),
        one(tensor("[9223372036854775807]", i64::MAX as u64)),
        one(tensor("[4]", 1 << 40)),
        one(tensor("[1099511627776]", 4)),
        one(tensor("[0,1099511627776]", 1 << 40)),
    ]);
    for file in files {
        assert!(file.len() < 600);
        let (outcome, held) = measured(|| from_bytes(&file));
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::File);
        // The text of a tree of one tensor takes more than a length, and not by what it claims.
        assert!(held < 16 << 10, "{held} bytes");
    }
}

/// Headers whose values take more memory than their text.
#[test]
fn the_readers_memory_is_in_proportion_to_the_header() {
    // One item more than a power of two: lists have just grown.
    let count = if is_full() { (1 << 20) + 1 } else { (1 << 14) + 1 };
    let list = |item: &str, len: usize| format!("[{}0]", format!("{item},").repeat(len / item.len()));
    let keys = || (0..count).map(|i| format!("\"{i:x}\":0,")).collect::<String>();
    let deep = |open: &str, close: &str| [open.repeat(50), close.repeat(50)].concat();
    let tree = |text: String| forged(&text, "", &[]);
    let empty = || Tree::Tensor(tensor(DataType::Int8, &[0], []));
    let header = |text: String| with_header(text, &[]);
    let files = [
        tree(list("0", count)),
        tree(list("[]", count)),
        tree(list("[0]", count)),
        tree(list("\"\"", count)),
        tree(list("1e15", count)),
        tree(list("1e-300", count)),
        tree(list(r#"{"":0}"#, count)),
        tree(list(r#"{"$tuple":[0]}"#, count)),
        tree(list(r#"{"$float":"nan"}"#, count)),
        tree(list(&deep("[", "]"), count)),
        tree(list(&deep("[0,", "0]"), count)),
        tree(list(&deep(r#"{"":"#, "}").replace(":}", ":0}"), count)),
        tree(format!(r#"{{{}"":0}}"#, keys())),
        tree(format!("{:?}", "x".repeat(count))),
        tree(format!("\"{}\"", "\\n".repeat(count))),
        header(list("0", count)),
        header(list("[0]", count)),
        header(list(r#"{"":0}"#, count)),
        header(format!(r#"{{{}"":0}}"#, keys())),
        header("[0,".repeat(count)),
        header(deep(r#"{"":"#, "}")),
        // As many entries as tensors could be, of the shortest text.
        forged("1", &(0..count).map(|i| format!("\"{i:x}\":{{}}")).collect::<Vec<_>>().join(","), &[]),
        forged("1", &format!(r#""a":{{"dtype":"U8","shape":{},"data_offsets":[0,0]}}"#, list("0", count)), &[]),
        forged("1", &format!(r#""a":{{"dtype":"U8","shape":[],"data_offsets":{}}}"#, list("0", count)), &[0]),
        to_bytes(&Tree::List(vec![empty(); count / 16])).unwrap(),
        to_bytes(&Tree::Dict((0..count as i64 / 16).map(|i| (Key::Int(i), empty())).collect())).unwrap(),
        // Mostly data, which is held once.
        to_bytes(&Tree::List(vec![Tree::Tensor(tensor(DataType::Int8, &[count], vec![1; count])); 3])).unwrap(),
    ];
    for file in files {
        let _ = read(&file);
    }
}

// ---- Damage --------------------------------------------------------------------------------------------

#[test]
fn every_flipped_bit_is_noticed() {
    for (mut file, tree) in [(to_bytes(&sample()).unwrap(), sample()), of_len(4096)] {
        for bit in 0..file.len() * 8 {
            file[bit / 8] ^= 1 << (bit % 8);
            refusal(&file);
            file[bit / 8] ^= 1 << (bit % 8);
        }
        assert_eq!(read(&file).unwrap(), tree);
    }
}

#[test]
fn a_flipped_bit_of_a_large_file_is_noticed() {
    let (len, flips) = if is_full() { (64 << 20, 1000) } else { (1 << 20, 20) };
    let (file, tree) = of_len(len);
    let file = std::cell::RefCell::new(file);
    let outcome = runner(flips).run(&(any::<Index>(), 0..8u8), |(at, bit)| {
        let mut file = file.borrow_mut();
        let at = at.index(len);
        file[at] ^= 1 << bit;
        refusal(&file);
        file[at] ^= 1 << bit;
        Ok(())
    });
    outcome.unwrap();
    assert_eq!(read(&file.borrow()).unwrap(), tree);
}

/// A file of exactly so many bytes, and its tree.
fn of_len(len: usize) -> (Vec<u8>, Tree) {
    let tree = |count: usize| {
        let bytes: Vec<u8> = (0..count).map(|i| (i % 251) as u8).collect();
        let betas = Tree::Tuple(vec![Tree::Float(0.9), Tree::Float(0.999)]);
        Tree::dict([
            ("step", Tree::Int(5)),
            ("betas", betas),
            ("W", Tree::Tensor(tensor(DataType::UInt8, &[count], bytes))),
        ])
    };
    // The header's length follows the number of digits, so the second guess is right.
    let mut count = len;
    for _ in 0..2 {
        count -= to_bytes(&tree(count)).unwrap().len() - len;
    }
    let (file, tree) = (to_bytes(&tree(count)).unwrap(), tree(count));
    assert_eq!(file.len(), len);
    (file, tree)
}

#[test]
fn every_truncation_and_every_extension_is_noticed() {
    let file = to_bytes(&sample()).unwrap();
    for len in 0..file.len() {
        refusal(&file[..len]);
    }
    for extra in [1, 64, 1000] {
        let long = [file.clone(), vec![0; extra]].concat();
        assert!(refusal(&long).contains("trailing bytes"));
    }
}

// ---- Mutations -----------------------------------------------------------------------------------------

/// One change. Places are within the header where `bool` says so, and else anywhere.
#[derive(Debug, Clone)]
enum Edit {
    Set(u8),
    Flip(u8),
    Insert(&'static [u8]),
    Remove(usize),
    Swap(Index),
    /// A number one larger or one smaller.
    Count(bool),
    /// Bytes of some base file, in place of as many or between.
    Splice {
        base: usize,
        from: Index,
        len: usize,
        over: bool,
    },
    Truncate,
}

const PIECES: &[&[u8]] = &[
    b"0",
    b"1",
    b"-1",
    b"9223372036854775808",
    b"18446744073709551616",
    b"1e999",
    b"null",
    b"{}",
    b"[",
    b"]",
    b"}",
    b"\"",
    b",",
    b":",
    b" ",
    b"\\",
    b"\\\"",
    b"$tuple",
    b"$tensor",
    b"#1",
    b"[[[[",
    b"\xff",
    b"\0",
    b"F64",
    b"I8",
    b"[],",
    b"1,",
    b"\\\"a\\\":1,",
];

fn edit() -> impl Strategy<Value = Edit> {
    prop_oneof![
        any::<u8>().prop_map(Edit::Set),
        (0..8u8).prop_map(Edit::Flip),
        proptest::sample::select(PIECES).prop_map(Edit::Insert),
        (1..20usize).prop_map(Edit::Remove),
        any::<Index>().prop_map(Edit::Swap),
        any::<bool>().prop_map(Edit::Count),
        (0..BASES, any::<Index>(), 1..100usize, any::<bool>()).prop_map(|(base, from, len, over)| Edit::Splice {
            base,
            from,
            len,
            over
        }),
        Just(Edit::Truncate),
    ]
}

impl Edit {
    fn apply(&self, file: &mut Vec<u8>, at: usize, within: usize, bases: &[Vec<u8>]) {
        match self {
            Self::Set(byte) => file[at] = *byte,
            Self::Flip(bit) => file[at] ^= 1 << bit,
            Self::Insert(piece) => drop(file.splice(at..at, piece.iter().copied())),
            Self::Remove(len) => drop(file.drain(at..within.min(at + len))),
            Self::Swap(other) => file.swap(at, other.index(within)),
            Self::Count(up) => {
                let Some(digits) = number(&file[..within], at) else { return };
                let text = String::from_utf8_lossy(&file[digits.clone()]);
                // One too long for this stays.
                let Ok(value) = text.parse::<u128>() else { return };
                let value = if *up { value.saturating_add(1) } else { value.saturating_sub(1) };
                file.splice(digits, value.to_string().into_bytes());
            }
            Self::Splice { base, from, len, over } => {
                let source = &bases[*base];
                let from = from.index(source.len());
                let piece = source[from..source.len().min(from + len)].to_vec();
                let end = if *over { within.min(at + piece.len()) } else { at };
                file.splice(at..end, piece);
            }
            Self::Truncate => file.truncate(at),
        }
    }
}

/// The digits of the first number from a place on.
fn number(file: &[u8], at: usize) -> Option<Range<usize>> {
    let start = (at..file.len()).find(|&i| file[i].is_ascii_digit())?;
    let len = file[start..].iter().take_while(|c| c.is_ascii_digit()).count();
    Some(start..start + len)
}

/// Makes everything before the last `data` bytes the header, with the right padding.
fn repad(file: &mut Vec<u8>, data: usize) {
    let Some(end) = file.len().checked_sub(data).filter(|&end| end > 8) else { return };
    let text = file[8..end].trim_ascii_end().len();
    let padded = (8 + text).next_multiple_of(64) - 8;
    file.splice(8 + text..end, std::iter::repeat_n(b' ', padded - text));
    file[..8].copy_from_slice(&(padded as u64).to_le_bytes());
}

const BASES: usize = 4;

/// The state of an optimizer, one of everything, a small file, many tensors.
fn bases() -> [Vec<u8>; BASES] {
    let mut adam = Optimizer::cpu("Adam", &Options { threads: Some(1), ..Options::default() }).unwrap();
    let param = ParamInfo { name: Some("W".into()), shape: vec![2, 3], dtype: Dtype::F32, resident: false };
    adam.add_group(&[], vec![param]).unwrap();
    let (mut values, gradient) = ([1.0f32; 6], [0.5f32; 6]);
    for _ in 0..3 {
        adam.step(&mut [values.as_mut_slice().into()], &[Some(TensorRef::from(&gradient[..]))]).unwrap();
    }
    let state = adam.state_dict().unwrap().into_tree(true);
    let small = Tree::dict([("a", floats(&[1.0, 2.0])), ("b", Tree::Int(3))]);
    let many = (0..100i64).map(|i| {
        let dtype = DataType::ALL[i as usize % DataType::ALL.len()];
        (Key::Int(i), Tree::Tensor(tensor(dtype, &[1], vec![1; dtype.size()])))
    });
    [state, sample(), small, Tree::Dict(many.collect())].map(|tree| to_bytes(&tree).unwrap())
}

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() })
}

/// Random changes, most of them sealed again with the right checksum: no panic, no more memory than the file allows,
/// and what is accepted is the one file of its tree.
#[test]
fn mutated_files_never_panic() {
    let bases = bases();
    let edit = (edit(), any::<bool>(), any::<Index>());
    let strategy = (0..BASES, vec(edit, 1..4), any::<bool>(), proptest::bool::weighted(0.9));
    let accepted = Cell::new(0);
    let cases = if is_full() {
        1_000_000
    } else if is_brief() {
        500
    } else {
        20_000
    };
    let outcome = runner(cases).run(&strategy, |(base, edits, padded, sealed)| {
        let mut file = bases[base].clone();
        let data = file.len() - 8 - u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        for (edit, in_header, at) in edits {
            let header = file.len().saturating_sub(data);
            let within = if in_header && header > 0 { header } else { file.len() };
            if within > 0 {
                edit.apply(&mut file, at.index(within), within, &bases);
            }
        }
        if padded {
            repad(&mut file, data);
        }
        if sealed {
            seal(&mut file);
        }
        // All of them have short headers.
        prop_assert!(allowance(&file) <= file.len() + (1 << 20));
        match read(&file) {
            Ok(tree) => {
                accepted.set(accepted.get() + 1);
                prop_assert_eq!(to_bytes(&tree).unwrap(), file);
            }
            Err(error) => prop_assert!(matches!(error.kind(), ErrorKind::File | ErrorKind::Newer)),
        }
        Ok(())
    });
    outcome.unwrap();
    assert!(accepted.get() > cases / 100, "some changes give the file of another tree, only {} did", accepted.get());
}
