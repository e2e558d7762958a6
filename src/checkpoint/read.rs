//! The strict reader: bytes to a tree, or one sentence about what is wrong.

use std::collections::HashMap;
use std::fmt::Display;
use std::io::Read;
use std::path::Path as FilePath;

use super::commit::{Meter, PIECE, Progress, failed, retried, silent};
use super::disk::{Disk, OsDisk};
use super::json::{Json, shown};
use super::serial::inline_tensor;
use super::tree::{Bytes, DataType, Key, TensorData, Tree, byte_count};
use super::write::{Image, PLAIN_NAN, is_big_int, stored_size};
use super::{
    CHECKSUM_AT, CHECKSUM_BLANK, CHECKSUM_LEN, Checksum, FORMAT, MAX_DEPTH, MAX_HEADER_LEN, MAX_INT_DIGITS,
    MAX_NAME_LEN, MAX_RANK, OPENING,
};
use crate::error::{Error, ErrorKind, Result};

/// The tree of a file given as bytes. Anything but what [`to_bytes`](super::to_bytes) gives for some
/// tree is refused with kind `File`.
pub fn from_bytes(bytes: &[u8]) -> Result<Tree> {
    let reader = Reader { path: FilePath::new("checkpoint"), place: "checkpoint" };
    reader.read(bytes, bytes.len() as u64, &mut silent)?.sound()
}

/// Reads the tree of a file that [`save`](super::save) wrote.
pub fn load(path: impl AsRef<FilePath>) -> Result<Tree> {
    load_from(&OsDisk, path.as_ref(), &mut silent)
}

/// [`load`] from any file system, with reports of progress.
pub fn load_from<D: Disk>(disk: &D, path: &FilePath, progress: Progress<'_>) -> Result<Tree> {
    read_from(disk, path, progress)?.sound()
}

/// Reads a file whose data may be damaged: what can be shown of it, and whether the checksum is right. Other
/// damage is refused as by [`load`].
pub fn examine(path: impl AsRef<FilePath>) -> Result<Examined> {
    read_from(&OsDisk, path.as_ref(), &mut silent)
}

/// Whether a file has the form and the length of a checkpoint. The data, which takes long, is not looked at.
pub(super) fn seems_whole<D: Disk>(disk: &D, path: &FilePath) -> bool {
    retried(|| disk.open(path)).is_ok_and(|(mut file, len)| Reader { path, place: "" }.start(&mut file, len).is_ok())
}

fn read_from<D: Disk>(disk: &D, path: &FilePath, progress: Progress<'_>) -> Result<Examined> {
    let (file, len) = retried(|| disk.open(path)).map_err(failed(path, CANNOT_READ))?;
    Reader { path, place: &path.display().to_string() }.read(file, len, progress)
}

const CANNOT_READ: &str = "the file could not be read";

/// What is in a file, and whether it is what was written.
#[derive(Debug)]
pub struct Examined {
    /// The values.
    pub tree: Tree,
    /// The checksum that the file states.
    pub stated: String,
    /// The checksum that its contents give.
    pub found: String,
    /// Bytes of the file.
    pub len: u64,
    damage: Option<Error>,
}

impl Examined {
    /// The tree, if the checksum is right.
    pub fn sound(self) -> Result<Tree> {
        self.damage.map_or(Ok(self.tree), Err)
    }
}

/// `place` starts every message.
struct Reader<'p> {
    path: &'p FilePath,
    place: &'p str,
}

/// A tensor as the header gives it, with its bytes.
struct Entry {
    dtype: DataType,
    shape: Vec<usize>,
    bytes: Bytes,
}

impl Reader<'_> {
    fn error(&self, name: impl Display, allowed: impl Display, got: impl Display) -> Error {
        Error::refuse(ErrorKind::File, self.place, name, allowed, got)
    }

    fn refuse<T>(&self, name: impl Display, allowed: impl Display, got: impl Display) -> Result<T> {
        Err(self.error(name, allowed, got))
    }

    /// Reads up to `len` more bytes.
    fn fill(&self, bytes: &mut Vec<u8>, source: &mut impl Read, len: usize) -> Result<()> {
        self.reserve(bytes, len)?;
        source.take(len as u64).read_to_end(bytes).map_err(failed(self.path, CANNOT_READ))?;
        Ok(())
    }

    /// Room for `len` more bytes, which the caller knows to be in the file.
    fn reserve(&self, bytes: &mut Vec<u8>, len: usize) -> Result<()> {
        bytes.try_reserve_exact(len).map_err(|_| {
            let sentence = format!("{}: {len} bytes of the file could not be allocated", self.place);
            Error::plain(ErrorKind::OutOfMemory, sentence)
        })
    }

    fn refuse_shorter(&self, got: usize, wanted: usize) -> Result<()> {
        if got < wanted {
            return self.refuse("the file", "as long as it was when it was opened", "a shorter one");
        }
        Ok(())
    }

    /// Length of the header in a file of `len` bytes that starts with `start`.
    fn header_len(&self, start: &[u8], len: u64) -> Result<usize> {
        if let Some(kind) = foreign(start) {
            return self.refuse("the file", "one that roptim wrote", kind);
        }
        let Some(first) = start.first_chunk::<8>() else {
            return self.refuse("the file", "at least 8 bytes long", start.len());
        };
        let header_len = u64::from_le_bytes(*first);
        if header_len > MAX_HEADER_LEN as u64 {
            return self.refuse("the header's length", format!("at most {MAX_HEADER_LEN}"), header_len);
        }
        let held = len.saturating_sub(8);
        if header_len > held {
            return self.refuse("the header's length", format!("at most the {held} bytes that follow it"), header_len);
        }
        // At most MAX_HEADER_LEN.
        Ok(header_len as usize)
    }

    /// Reads and checks everything before the data.
    fn start(&self, source: &mut impl Read, len: u64) -> Result<Started> {
        // The start is looked at first, so that a large file of another kind is not read whole.
        let mut head = Vec::new();
        self.fill(&mut head, source, 8)?;
        let header_len = self.header_len(&head, len)?;
        self.fill(&mut head, source, header_len)?;
        self.refuse_shorter(head.len(), 8 + header_len)?;
        let header = match str::from_utf8(&head[8..]) {
            Ok(header) => header,
            Err(error) => return self.refuse("the header", "UTF-8", error),
        };
        let header = match Json::parse(header) {
            Ok(header) => header,
            Err(error) => return self.refuse("the header", "strict JSON", error),
        };
        let Json::Object(mut items) = header else {
            return self.refuse("the header", "an object", header.describe());
        };
        let metadata = match items.iter().position(|(key, _)| key == "__metadata__") {
            Some(0) => items.remove(0).1,
            Some(i) => return self.refuse("__metadata__", "the header's first key", format!("key {i}")),
            None => return self.refuse("the file", "one that roptim wrote", "a safetensors file without metadata"),
        };
        let structure = self.structure(metadata)?;
        let listed = self.entries(items, len - head.len() as u64)?;
        if !head[8..].starts_with(OPENING.as_bytes()) {
            return self.refuse("the header's opening", "in canonical form", "another form of the same JSON");
        }
        Ok(Started { head, structure, listed })
    }

    fn read(&self, mut source: impl Read, len: u64, progress: Progress<'_>) -> Result<Examined> {
        let Started { mut head, structure, listed } = self.start(&mut source, len)?;
        let mut checksum = Checksum::of_head(&head);
        let mut meter = Meter::new(len, progress);
        meter.advance(head.len())?;
        let mut entries = HashMap::with_capacity(listed.len());
        for Listed { name, dtype, shape, range } in listed {
            let mut bytes = Vec::new();
            self.reserve(&mut bytes, range.len())?;
            while bytes.len() < range.len() {
                let start = bytes.len();
                let portion = PIECE.min(range.len() - start);
                self.fill(&mut bytes, &mut source, portion)?;
                self.refuse_shorter(bytes.len(), start + portion)?;
                checksum.update(&bytes[start..]);
                meter.advance(portion)?;
            }
            entries.insert(name, Some(Entry { dtype, shape, bytes: bytes.into() }));
        }
        let mut beyond = Vec::new();
        self.fill(&mut beyond, &mut source, 1)?;
        if !beyond.is_empty() {
            return self.refuse("the data", format!("{} bytes long", len - head.len() as u64), "trailing bytes");
        }
        let (found, stated) = (checksum.digits(), structure.checksum);
        let damage = (stated != found).then(|| {
            let error = self.error("the checksum", format!("{found} as the contents give"), &stated);
            error.with_remedy("the file is damaged, restore it from a copy")
        });
        let tree = Growth { reader: self, entries: Some(entries) }.finish(structure.tree);
        // What damage left of the data is no news.
        let tree = match (tree, damage) {
            (Err(_), Some(damage)) => return Err(damage),
            (Err(error), None) => return Err(error),
            (Ok(tree), damage) => (tree, damage),
        };
        let (tree, damage) = tree;
        // One tree, one file: this also holds for the forms of JSON that no check above has looked at.
        head[CHECKSUM_AT].copy_from_slice(&CHECKSUM_BLANK);
        let canonical = match Image::unsealed(&tree, self.place) {
            Ok(image) => image.head,
            Err(error) => return Err(Error::plain(ErrorKind::File, error.to_string()).with_source(error)),
        };
        // The length behind the text, so that a difference in padding is called by its name.
        match head.iter().zip(&canonical).skip(8).position(|(a, b)| a != b) {
            Some(at) => {
                self.refuse("the header", "in canonical form", format!("another form at byte {} of the file", at + 8))
            }
            None if head.len() != canonical.len() => {
                self.refuse("the header's length", canonical.len() - 8, head.len() - 8)
            }
            None => Ok(Examined { tree, stated, found, len, damage }),
        }
    }

    fn structure(&self, metadata: Json) -> Result<Envelope> {
        let Json::Object(mut items) = metadata else {
            return self.refuse("__metadata__", "an object", metadata.describe());
        };
        let Some(ours) = items.iter().position(|(key, _)| key == "roptim") else {
            let got = "a safetensors file without the metadata of roptim";
            return self.refuse("the file", "one that roptim wrote", got);
        };
        let text = match items.swap_remove(ours).1 {
            Json::Str(text) => text,
            other => return self.refuse("__metadata__.roptim", "a string", other.describe()),
        };
        let fields = match Json::parse(&text) {
            Ok(Json::Object(fields)) => fields,
            Ok(other) => return self.refuse("__metadata__.roptim", "an object", other.describe()),
            Err(error) => return self.refuse("__metadata__.roptim", "strict JSON", error),
        };
        const OURS: i64 = FORMAT as i64;
        const LATER: i64 = OURS + 1;
        // The version first: a later one may have other fields, here and beside.
        match fields.iter().find(|(key, _)| key == "format").map(|(_, version)| version) {
            Some(Json::Int(OURS)) => {}
            Some(version @ (Json::Int(LATER..) | Json::UInt(_))) => {
                let allowed = format!("at most {FORMAT}");
                let error =
                    Error::refuse(ErrorKind::Newer, self.place, "the format version", allowed, version.describe());
                return Err(error.with_remedy("a later roptim wrote the file, install that one to read it"));
            }
            Some(other) => return self.refuse("the format version", FORMAT, other.describe()),
            None => return self.refuse("the format version", "present", "none"),
        }
        if let Some((other, _)) = items.first() {
            return self.refuse("__metadata__", "of the one key \"roptim\"", shown(other));
        }
        let (mut digits, mut tree) = (None, None);
        for (key, value) in fields {
            match (key.as_str(), value) {
                ("format", _) => {}
                ("checksum", Json::Str(text)) => digits = Some(text),
                ("checksum", other) => return self.refuse("the checksum", "a string", other.describe()),
                ("tree", value) => tree = Some(value),
                _ => return self.refuse("a key of __metadata__.roptim", "format, checksum or tree", shown(&key)),
            }
        }
        let Some(checksum) = digits else { return self.refuse("the checksum", "present", "none") };
        let Some(tree) = tree else { return self.refuse("the tree", "present", "none") };
        let hexadecimal = checksum.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'));
        if checksum.len() != CHECKSUM_LEN || !hexadecimal {
            let allowed = format!("{CHECKSUM_LEN} digits 0-9 and a-f");
            return self.refuse("the checksum", allowed, shown(&checksum));
        }
        Ok(Envelope { checksum, tree })
    }

    /// Checks what the header says of the tensors, against the `held` bytes of data.
    fn entries(&self, items: Vec<(String, Json)>, held: u64) -> Result<Vec<Listed>> {
        let mut entries: Vec<Listed> = Vec::with_capacity(items.len());
        let mut end = 0;
        for (name, item) in items {
            let entry = self.entry(name, item, end)?;
            end = entry.range.end;
            if end as u64 > held {
                let place = format!("tensor {}", shown(&entry.name));
                return self.refuse(place, format!("within the {held} bytes of data"), format!("an end at {end}"));
            }
            if let Some(last) = entries.last() {
                let key = |e: &Listed| std::cmp::Reverse(stored_size(e.dtype));
                let ascending = key(last).cmp(&key(&entry)).then_with(|| last.name.cmp(&entry.name));
                if ascending != std::cmp::Ordering::Less {
                    let place = format!("tensor {}", shown(&entry.name));
                    let got = format!("its place behind {}", shown(&last.name));
                    return self.refuse(place, "in order of element size, then name", got);
                }
            }
            entries.push(entry);
        }
        if end as u64 != held {
            return self.refuse("the data", format!("{end} bytes long"), format!("{held}, with trailing bytes"));
        }
        Ok(entries)
    }

    fn entry(&self, name: String, item: Json, begin: usize) -> Result<Listed> {
        let place = format!("tensor {}", shown(&name));
        let forbidden = |c: char| c.is_control() || c == '/' || c == '\\';
        if name.is_empty() || name.len() > MAX_NAME_LEN {
            return self.refuse("a tensor's name", format!("1 to {MAX_NAME_LEN} bytes long"), name.len());
        }
        if name.contains(forbidden) {
            return self.refuse("a tensor's name", "without slashes and control characters", shown(&name));
        }
        let Json::Object(fields) = item else { return self.refuse(place, "an object", item.describe()) };
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        for (field, value) in fields {
            match (field.as_str(), value) {
                ("dtype", Json::Str(name)) => match DataType::from_container_name(&name) {
                    Some(known) => dtype = Some(known),
                    None => return self.refuse(format!("dtype of {place}"), dtypes(), shown(&name)),
                },
                ("shape", Json::List(axes)) => shape = Some(axes),
                ("data_offsets", Json::List(ends)) => offsets = Some(ends),
                ("dtype", other) => return self.refuse(format!("dtype of {place}"), "a string", other.describe()),
                (field @ ("shape" | "data_offsets"), other) => {
                    return self.refuse(format!("{field} of {place}"), "a list", other.describe());
                }
                _ => return self.refuse(format!("a field of {place}"), "dtype, shape or data_offsets", shown(&field)),
            }
        }
        let missing = |field: &str| self.refuse(format!("{field} of {place}"), "present", "none");
        let Some(dtype) = dtype else { return missing("dtype") };
        let Some(axes) = shape else { return missing("shape") };
        let Some(ends) = offsets else { return missing("data_offsets") };
        if axes.len() > MAX_RANK {
            return self.refuse(format!("shape of {place}"), format!("of at most {MAX_RANK} axes"), axes.len());
        }
        let shape = self.sizes(&axes, || format!("shape of {place}"))?;
        let ends = self.sizes(&ends, || format!("data_offsets of {place}"))?;
        let Some(len) = byte_count(dtype, &shape) else {
            let got = format!("{shape:?} of {dtype}");
            return self.refuse(format!("shape of {place}"), "one that fits in memory", got);
        };
        let [from, to] = ends[..] else {
            return self.refuse(format!("data_offsets of {place}"), "two numbers", ends.len());
        };
        if from != begin {
            let allowed = format!("from {begin}, where the tensor before it ends");
            return self.refuse(format!("data_offsets of {place}"), allowed, format!("from {from}"));
        }
        if to.checked_sub(from) != Some(len) {
            let allowed = format!("{len} apart as the shape asks");
            return self.refuse(format!("data_offsets of {place}"), allowed, format!("{from} and {to}"));
        }
        Ok(Listed { name, dtype, shape, range: from..to })
    }

    fn sizes(&self, list: &[Json], name: impl Fn() -> String) -> Result<Vec<usize>> {
        let size = |item: &Json| match item {
            Json::Int(x) => usize::try_from(*x).ok(),
            Json::UInt(x) => usize::try_from(*x).ok(),
            _ => None,
        };
        list.iter()
            .map(|item| match size(item) {
                Some(size) => Ok(size),
                None => self.refuse(name(), "of integers from 0 to what memory can address", item.describe()),
            })
            .collect()
    }
}

/// What stands before the data.
struct Started {
    head: Vec<u8>,
    structure: Envelope,
    listed: Vec<Listed>,
}

struct Envelope {
    checksum: String,
    tree: Json,
}

struct Listed {
    name: String,
    dtype: DataType,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
}

/// What a file of another kind is called, by its first bytes.
fn foreign(start: &[u8]) -> Option<&'static str> {
    match start {
        [b'P', b'K', 3, 4, ..] | [b'P', b'K', 5, 6, ..] => Some("a zip archive, as torch.save and numpy.savez write"),
        [0x93, b'N', b'U', b'M', b'P', b'Y', ..] => Some("an array file of numpy.save"),
        // A third byte, because the length of another tool's header may start with the first two.
        [0x80, 2..=5, b'c' | b'}' | b']' | b'(' | 0x95 | 0x8a, ..] => Some("a pickle"),
        [0x89, b'H', b'D', b'F', b'\r', b'\n', 0x1a, b'\n'] => Some("an HDF5 file"),
        [0x1f, 0x8b, 8, ..] => Some("a gzip file"),
        // No length either: it would be above 2^56.
        [_, _, _, _, _, _, _, _] if start.iter().all(|c| matches!(c, b' '..=b'~' | b'\t' | b'\n' | b'\r')) => {
            Some("a text file")
        }
        _ => None,
    }
}

/// What a header may call the type of a tensor.
fn dtypes() -> String {
    let own = DataType::ALL.into_iter().filter(|&dtype| dtype != DataType::Complex128);
    own.map(DataType::container_name).fold("one of".into(), |all, name| all + " " + name)
}

/// Builds the tree, taking each tensor once: what was taken leaves its name.
struct Growth<'r> {
    reader: &'r Reader<'r>,
    /// Tensors of the file by name; None where they stand in the tree itself.
    entries: Option<HashMap<String, Option<Entry>>>,
}

/// The tree of JSON text that holds its tensors itself.
pub(super) fn grown(json: Json) -> Result<Tree> {
    let reader = Reader { path: FilePath::new("JSON"), place: "JSON" };
    Growth { reader: &reader, entries: None }.finish(json)
}

impl Growth<'_> {
    fn finish(mut self, json: Json) -> Result<Tree> {
        let tree = self.tree(json, 0)?;
        let left = self.entries.iter().flatten().filter(|(_, entry)| entry.is_some());
        match left.map(|(name, _)| name).min() {
            Some(name) => {
                self.reader.refuse(format!("tensor {}", shown(name)), "part of the tree", "no reference to it")
            }
            None => Ok(tree),
        }
    }

    fn tree(&mut self, json: Json, depth: usize) -> Result<Tree> {
        Ok(match json {
            Json::Null => Tree::None,
            Json::Bool(x) => Tree::Bool(x),
            Json::Int(x) => Tree::Int(x),
            Json::UInt(x) => Tree::UInt(x),
            Json::Float(x) => Tree::Float(x),
            Json::Str(x) => Tree::Str(x),
            Json::List(items) => Tree::List(self.items(items, depth)?),
            Json::Object(items) => match items.first() {
                Some((tag, _)) if is_tag(tag) => self.tagged(items, depth)?,
                _ => self.dict(items, depth)?,
            },
        })
    }

    fn enter(&self, depth: usize) -> Result<()> {
        if depth >= MAX_DEPTH {
            return self.reader.refuse("the tree", format!("at most {MAX_DEPTH} levels deep"), "another level");
        }
        Ok(())
    }

    fn items(&mut self, items: Vec<Json>, depth: usize) -> Result<Vec<Tree>> {
        self.enter(depth)?;
        let mut list = Vec::with_capacity(items.len());
        for item in items {
            list.push(self.tree(item, depth + 1)?);
        }
        Ok(list)
    }

    fn dict(&mut self, items: Vec<(String, Json)>, depth: usize) -> Result<Tree> {
        self.enter(depth)?;
        let mut dict = Vec::with_capacity(items.len());
        for (key, value) in items {
            let key = self.key(key)?;
            dict.push((key, self.tree(value, depth + 1)?));
        }
        Ok(Tree::Dict(dict))
    }

    fn key(&self, key: String) -> Result<Key> {
        if let Some(digits) = key.strip_prefix('#') {
            return match digits.parse::<i64>() {
                Ok(number) if number.to_string() == digits => Ok(Key::Int(number)),
                _ => {
                    let allowed = "the shortest form of an integer of 64 bits with sign";
                    self.reader.refuse("what follows the # of a key", allowed, shown(digits))
                }
            };
        }
        match key.strip_prefix('$') {
            Some(plain) if plain.starts_with(['#', '$']) => Ok(Key::Str(plain.to_owned())),
            Some(_) => self.reader.refuse("a tag", "the first key of its object", shown(&key)),
            None => Ok(Key::Str(key)),
        }
    }

    fn tagged(&mut self, items: Vec<(String, Json)>, depth: usize) -> Result<Tree> {
        let mut items = items.into_iter();
        let Some((tag, value)) = items.next() else { return Ok(Tree::Dict(Vec::new())) };
        let second = items.next();
        if let (Some((extra, _)), false) = (&second, matches!(tag.as_str(), "$tensor" | "$scalar")) {
            return self.reader.refuse(format!("an object with {tag}"), "of that one key", shown(extra));
        }
        if let Some((extra, _)) = items.next() {
            return self.reader.refuse(format!("an object with {tag}"), "of at most two keys", shown(&extra));
        }
        match (tag.as_str(), value) {
            ("$tuple", Json::List(items)) => Ok(Tree::Tuple(self.items(items, depth)?)),
            ("$int", Json::Str(digits)) if is_big_int(&digits) => Ok(Tree::BigInt(digits)),
            ("$int", Json::Str(digits)) => {
                let allowed = format!("an integer beyond 64 bits in at most {MAX_INT_DIGITS} digits");
                self.reader.refuse("$int", allowed, shown(&digits))
            }
            ("$float", Json::Str(text)) => match special_float(&text) {
                Some(x) => Ok(Tree::Float(x)),
                None => self.reader.refuse("$float", "inf, -inf, nan or the bits of a NaN", shown(&text)),
            },
            ("$tensor", Json::Object(fields)) if self.entries.is_none() => Ok(Tree::Tensor(inline_tensor(fields)?)),
            ("$scalar", Json::Object(fields)) if self.entries.is_none() => {
                let tensor = inline_tensor(fields)?;
                if !tensor.shape.is_empty() {
                    return self.reader.refuse("$scalar", "without axes", format!("{:?}", tensor.shape));
                }
                Ok(Tree::Scalar(tensor))
            }
            ("$tensor" | "$scalar", other) if self.entries.is_none() => {
                self.reader.refuse(tag, "an object", other.describe())
            }
            ("$tensor", Json::Str(name)) => Ok(Tree::Tensor(self.tensor(&name, second)?)),
            ("$scalar", Json::Str(name)) => {
                let tensor = self.tensor(&name, second)?;
                if tensor.shape.is_empty() {
                    return Ok(Tree::Scalar(tensor));
                }
                self.reader.refuse(format!("scalar {}", shown(&name)), "without axes", format!("{:?}", tensor.shape))
            }
            ("$tuple", other) => self.reader.refuse("$tuple", "a list", other.describe()),
            ("$int" | "$float" | "$tensor" | "$scalar", other) => self.reader.refuse(tag, "a string", other.describe()),
            _ => self.reader.refuse("a tag", "$tuple, $int, $float, $tensor or $scalar", shown(&tag)),
        }
    }

    fn tensor(&mut self, name: &str, second: Option<(String, Json)>) -> Result<TensorData> {
        let place = format!("tensor {}", shown(name));
        let entry = self.entries.as_mut().and_then(|entries| entries.get_mut(name)).map(Option::take);
        let Entry { mut dtype, mut shape, bytes } = match entry {
            Some(Some(entry)) => entry,
            Some(None) => return self.reader.refuse(place, "in the tree once", "a second reference to it"),
            None => return self.reader.refuse(place, "in the header", "a reference to nothing"),
        };
        match second {
            None => {}
            Some((key, Json::Str(real))) if key == "$dtype" => {
                if real != DataType::Complex128.name() {
                    return self.reader.refuse(format!("$dtype of {place}"), "complex128", shown(&real));
                }
                if dtype != DataType::Float64 || shape.pop() != Some(2) {
                    let allowed = "stored as F64 with a last axis of 2 to be complex128";
                    return self.reader.refuse(
                        place,
                        allowed,
                        format!("{} of another shape or type", dtype.container_name()),
                    );
                }
                dtype = DataType::Complex128;
            }
            Some((key, value)) => {
                let got = format!("{} with {}", shown(&key), value.describe());
                return self.reader.refuse(format!("the second key of {place}"), "$dtype with a string", got);
            }
        }
        if dtype == DataType::Bool
            && let Some(byte) = bytes.iter().find(|byte| **byte > 1)
        {
            return self.reader.refuse(place, "of the bytes 0 and 1 as BOOL", format!("a byte {byte}"));
        }
        Ok(TensorData { dtype, shape, bytes })
    }
}

fn is_tag(key: &str) -> bool {
    key.strip_prefix('$').is_some_and(|rest| !rest.starts_with(['#', '$']))
}

pub(super) fn special_float(text: &str) -> Option<f64> {
    match text {
        "inf" => return Some(f64::INFINITY),
        "-inf" => return Some(f64::NEG_INFINITY),
        "nan" => return Some(f64::from_bits(PLAIN_NAN)),
        _ => {}
    }
    let x = f64::from_bits(u64::from_str_radix(text.strip_prefix("nan:")?, 16).ok()?);
    x.is_nan().then_some(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::to_bytes;

    /// A file whose data is read in several pieces, and where the data begins.
    fn long() -> (Vec<u8>, usize, Tree) {
        let of = |len: usize, add: usize| {
            let bytes: Vec<u8> = (0..len).map(|i| ((i + add) * 7919 % 251) as u8).collect();
            Tree::Tensor(TensorData::new(DataType::UInt8, vec![len], bytes).unwrap())
        };
        let tree = Tree::dict([("a", of(2 * PIECE + 3, 0)), ("b", of(PIECE, 1)), ("c", of(5, 2))]);
        let file = to_bytes(&tree).unwrap();
        let header = u64::from_le_bytes(*file.first_chunk::<8>().unwrap());
        (file, 8 + header as usize, tree)
    }

    fn read(held: &[u8], len: usize) -> Result<Examined> {
        Reader { path: FilePath::new("f"), place: "f" }.read(held, len as u64, &mut silent)
    }

    #[test]
    fn a_file_that_became_shorter_since_it_was_opened_is_refused() {
        let (file, begin, _) = long();
        let mut cuts = vec![8, 9, begin / 2, begin - 1, begin, begin + 1, file.len() - 6, file.len() - 1];
        cuts.extend([begin + PIECE - 1, begin + PIECE, begin + 2 * PIECE, begin + 2 * PIECE + 4]);
        for cut in cuts {
            let error = read(&file[..cut], file.len()).unwrap_err();
            let sentence = "f: the file must be as long as it was when it was opened, got a shorter one";
            assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::File, sentence), "{cut} bytes");
        }
    }

    #[test]
    fn a_file_that_became_longer_since_it_was_opened_is_refused() {
        let (mut file, begin, _) = long();
        let len = file.len();
        file.push(0);
        let error = read(&file, len).unwrap_err();
        let sentence = format!("f: the data must be {} bytes long, got trailing bytes", len - begin);
        assert_eq!((error.kind(), error.to_string()), (ErrorKind::File, sentence));
    }

    #[test]
    fn tensors_of_several_pieces_are_read_whole_and_progress_is_told() {
        let (file, _, tree) = long();
        let (mut told, len) = (Vec::new(), file.len() as u64);
        let mut progress = |done: u64, all: u64| {
            told.push(done);
            assert_eq!(all, len);
            Ok(())
        };
        let reader = Reader { path: FilePath::new("f"), place: "f" };
        let found = reader.read(file.as_slice(), len, &mut progress).unwrap();
        assert!(found.tree == tree && found.damage.is_none());
        assert!(told.is_sorted() && told.last() == Some(&len), "{told:?}");
    }
}
