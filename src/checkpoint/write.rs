//! The writer: a tree to bytes, and bytes to disk.

use std::borrow::Cow;
use std::collections::HashSet;
use std::path::Path as FilePath;

use super::commit::{PIECE, Progress, replace, silent};
use super::disk::{Disk, OsDisk};
use super::json::{push_float, push_str};
use super::path::Path;
use super::tree::{DataType, Key, TensorData, Tree};
use super::{
    ALIGNMENT, CHECKSUM_AT, CHECKSUM_BLANK, Checksum, MAX_DEPTH, MAX_HEADER_LEN, MAX_INT_DIGITS, MAX_NAME_LEN,
    MAX_RANK, OPENING,
};
use crate::error::{Error, ErrorKind, Result};

/// The file of a tree, as bytes. The same tree gives the same bytes.
///
/// Refuses (kind `Value`) what the reader would refuse: a dict with a key twice, more than
/// [`MAX_DEPTH`] levels, an array whose bytes do not fit its shape, a header above [`MAX_HEADER_LEN`].
pub fn to_bytes(tree: &Tree) -> Result<Vec<u8>> {
    const PLACE: &str = "checkpoint";
    let image = Image::sealed(tree, PLACE)?;
    let mut bytes = Vec::new();
    let len = image.data().try_fold(image.head.len(), |n, data| n.checked_add(data.len()));
    let reserved = len.is_some_and(|len| bytes.try_reserve_exact(len).is_ok());
    if !reserved {
        return Err(Error::plain(ErrorKind::OutOfMemory, format!("{PLACE}: the file's bytes could not be allocated")));
    }
    bytes.extend_from_slice(&image.head);
    image.data().for_each(|data| bytes.extend_from_slice(data));
    Ok(bytes)
}

/// Writes the file of a tree, so that a crash or an error at any moment leaves the old file or the new
/// one.
///
/// The permissions are those of the file it replaces, else what the process gives new files (0666
/// without the umask). Where `path` is a symbolic link, the file it points to is replaced and the link
/// stays. What is not a regular file is refused.
pub fn save(path: impl AsRef<FilePath>, tree: &Tree) -> Result<()> {
    save_to(&OsDisk, path.as_ref(), tree, &mut silent)
}

/// [`save`] on any file system, with reports of progress.
pub fn save_to<D: Disk>(disk: &D, path: &FilePath, tree: &Tree, progress: Progress<'_>) -> Result<()> {
    let place = path.display().to_string();
    let image = Image::sealed(tree, &place)?;
    let total = image.tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum::<u64>() + image.head.len() as u64;
    replace(disk, path, total, progress, |sink| {
        sink.write(&image.head)?;
        if image.tensors.iter().all(|tensor| !tensor.bytes.are_lent()) {
            return image.data().try_for_each(|data| sink.write(data));
        }
        // Somebody else may write to lent memory. What goes to the disk is what was looked at last, and is whole
        // if nothing changed since the checksum.
        let mut written = Checksum::of_head(&image.head);
        let mut looked_at = Vec::with_capacity(PIECE);
        for portion in image.data().flat_map(|data| data.chunks(PIECE)) {
            looked_at.clear();
            looked_at.extend_from_slice(portion);
            written.update(&looked_at);
            sink.write(&looked_at)?;
        }
        if written.digits().as_bytes() != &image.head[CHECKSUM_AT] {
            let allowed = "left alone while they are saved";
            let error = Error::refuse(ErrorKind::Value, &place, "the arrays", allowed, "a change by another thread");
            return Err(error.with_remedy("stop it meanwhile, or save copies"));
        }
        Ok(())
    })
}

/// Writes bytes of another format to a file as [`save`] writes a tree.
pub fn write_file(path: impl AsRef<FilePath>, bytes: &[u8]) -> Result<()> {
    replace(&OsDisk, path.as_ref(), bytes.len() as u64, &mut silent, |sink| sink.write(bytes))
}

/// Everything of a file before the data, and the tensors in order.
pub(super) struct Image<'t> {
    /// Length, header and padding.
    pub(super) head: Vec<u8>,
    tensors: Vec<&'t TensorData>,
}

impl<'t> Image<'t> {
    /// With the checksum's digits blank. `place` starts the messages.
    pub(super) fn unsealed(tree: &'t Tree, place: &str) -> Result<Self> {
        let mut structure = Structure { place, json: String::new(), tensors: Vec::new() };
        structure.push(&Path::Root, 0, tree)?;
        let Structure { json, mut tensors, .. } = structure;
        tensors.sort_by(|(a, x), (b, y)| stored_size(y.dtype).cmp(&stored_size(x.dtype)).then_with(|| a.cmp(b)));

        let mut header = String::from(r#"{"__metadata__":{"roptim":"#);
        let blank = str::from_utf8(&CHECKSUM_BLANK).unwrap_or_default();
        push_str(&mut header, &format!(r#"{{"format":{},"checksum":"{blank}","tree":{json}}}"#, super::FORMAT));
        header.push('}');
        debug_assert!(header.starts_with(OPENING), "the checksum is looked for at a fixed place");
        let mut end = 0usize;
        for (name, tensor) in &tensors {
            let begin = end;
            end = begin.checked_add(tensor.bytes.len()).ok_or_else(|| {
                Error::refuse(ErrorKind::Value, place, "the data", "addressable", "more bytes than memory can hold")
            })?;
            header.push(',');
            push_str(&mut header, name);
            let mut shape = tensor.shape.clone();
            if tensor.dtype == DataType::Complex128 {
                shape.push(2);
            }
            let shape: Vec<String> = shape.iter().map(usize::to_string).collect();
            header.push_str(&format!(
                r#":{{"dtype":"{}","shape":[{}],"data_offsets":[{begin},{end}]}}"#,
                tensor.dtype.container_name(),
                shape.join(",")
            ));
        }
        header.push('}');
        let padded = (8 + header.len()).next_multiple_of(ALIGNMENT) - 8;
        if padded > MAX_HEADER_LEN {
            let remedy = "keep long lists of numbers as arrays";
            return Err(too_long(place, "the header", MAX_HEADER_LEN, padded).with_remedy(remedy));
        }
        let mut head = Vec::with_capacity(8 + padded);
        head.extend_from_slice(&(padded as u64).to_le_bytes());
        head.extend_from_slice(header.as_bytes());
        head.resize(8 + padded, b' ');
        Ok(Self { head, tensors: tensors.into_iter().map(|(_, tensor)| tensor).collect() })
    }

    fn sealed(tree: &'t Tree, place: &str) -> Result<Self> {
        let mut image = Self::unsealed(tree, place)?;
        let mut checksum = Checksum::of_head(&image.head);
        image.data().for_each(|data| checksum.update(data));
        image.head[CHECKSUM_AT].copy_from_slice(checksum.digits().as_bytes());
        Ok(image)
    }

    fn data(&self) -> impl Iterator<Item = &'t [u8]> + Clone {
        self.tensors.iter().map(|tensor| &*tensor.bytes)
    }
}

/// Bytes of an element as the container counts them: the data is in descending order of these, so that
/// every tensor is aligned.
pub(super) fn stored_size(dtype: DataType) -> usize {
    dtype.size().min(8)
}

fn too_long(place: &str, name: impl std::fmt::Display, allowed: usize, got: usize) -> Error {
    Error::refuse(ErrorKind::Value, place, name, format!("at most {allowed} bytes"), got)
}

/// Collects the structure's JSON and the tensors.
struct Structure<'t, 'p> {
    place: &'p str,
    json: String,
    tensors: Vec<(String, &'t TensorData)>,
}

impl<'t> Structure<'t, '_> {
    fn refuse(
        &self,
        path: &Path<'_>,
        allowed: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> std::result::Result<(), Error> {
        Err(Error::refuse(ErrorKind::Value, self.place, path, allowed, got))
    }

    fn push(&mut self, path: &Path<'_>, depth: usize, tree: &'t Tree) -> Result<()> {
        if self.json.len() > MAX_HEADER_LEN {
            let remedy = "keep long lists of numbers as arrays";
            return Err(too_long(self.place, "the header", MAX_HEADER_LEN, self.json.len()).with_remedy(remedy));
        }
        match tree {
            Tree::None => self.json.push_str("null"),
            Tree::Bool(x) => self.json.push_str(if *x { "true" } else { "false" }),
            Tree::Int(x) => self.json.push_str(&x.to_string()),
            Tree::UInt(x) => {
                if i64::try_from(*x).is_ok() {
                    return self.refuse(path, "Tree::Int below 2^63", format!("Tree::UInt({x})"));
                }
                self.json.push_str(&x.to_string());
            }
            Tree::BigInt(digits) => {
                if !is_big_int(digits) {
                    let allowed = format!("an integer beyond 64 bits in at most {MAX_INT_DIGITS} digits");
                    return self.refuse(path, allowed, format!("Tree::BigInt({digits:?})"));
                }
                self.json.push_str(&format!(r#"{{"$int":"{digits}"}}"#));
            }
            Tree::Float(x) if x.is_finite() => push_float(&mut self.json, *x),
            Tree::Float(x) => self.json.push_str(&format!(r#"{{"$float":"{}"}}"#, special_float(*x))),
            Tree::Str(x) => push_str(&mut self.json, x),
            Tree::List(items) => self.push_items(path, depth, items)?,
            Tree::Tuple(items) => {
                self.json.push_str(r#"{"$tuple":"#);
                self.push_items(path, depth, items)?;
                self.json.push('}');
            }
            Tree::Dict(items) => self.push_dict(path, depth, items)?,
            Tree::Scalar(tensor) => {
                if !tensor.shape.is_empty() {
                    return self.refuse(path, "without axes as a scalar", format!("shape {:?}", tensor.shape));
                }
                self.push_tensor(path, "$scalar", tensor)?;
            }
            Tree::Tensor(tensor) => self.push_tensor(path, "$tensor", tensor)?,
        }
        Ok(())
    }

    fn enter(&self, path: &Path<'_>, depth: usize) -> Result<()> {
        if depth >= MAX_DEPTH {
            return self.refuse(path, format!("at most {MAX_DEPTH} levels deep"), "another level");
        }
        Ok(())
    }

    fn push_items(&mut self, path: &Path<'_>, depth: usize, items: &'t [Tree]) -> Result<()> {
        self.enter(path, depth)?;
        self.json.push('[');
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                self.json.push(',');
            }
            self.push(&path.item(i), depth + 1, item)?;
        }
        self.json.push(']');
        Ok(())
    }

    fn push_dict(&mut self, path: &Path<'_>, depth: usize, items: &'t [(Key, Tree)]) -> Result<()> {
        self.enter(path, depth)?;
        let mut seen = HashSet::new();
        self.json.push('{');
        for (i, (key, value)) in items.iter().enumerate() {
            let path = path.key(key);
            if !seen.insert(key) {
                return self.refuse(&path, "in its dict once", "the key twice");
            }
            if i > 0 {
                self.json.push(',');
            }
            push_str(&mut self.json, &key_text(key));
            self.json.push(':');
            self.push(&path, depth + 1, value)?;
        }
        self.json.push('}');
        Ok(())
    }

    fn push_tensor(&mut self, path: &Path<'_>, tag: &str, tensor: &'t TensorData) -> Result<()> {
        tensor.check(self.place, &path.to_string())?;
        let complex = tensor.dtype == DataType::Complex128;
        let max_rank = MAX_RANK - usize::from(complex);
        if tensor.shape.len() > max_rank {
            return self.refuse(path, format!("of at most {max_rank} axes"), tensor.shape.len());
        }
        if complex && super::tree::byte_count(DataType::Float64, &[tensor.shape.as_slice(), &[2]].concat()).is_none() {
            return self.refuse(path, "of a shape that fits in memory", format!("{:?}", tensor.shape));
        }
        if tensor.dtype == DataType::Bool
            && let Some(byte) = tensor.bytes.iter().find(|byte| **byte > 1)
        {
            return self.refuse(path, "of the bytes 0 and 1 as a bool array", format!("a byte {byte}"));
        }
        let name = path.tensor_name();
        if name.len() > MAX_NAME_LEN {
            return Err(too_long(self.place, format!("the name of {path}"), MAX_NAME_LEN, name.len()));
        }
        self.json.push_str(&format!(r#"{{"{tag}":"#));
        push_str(&mut self.json, &name);
        if complex {
            self.json.push_str(r#","$dtype":"complex128""#);
        }
        self.json.push('}');
        self.tensors.push((name, tensor));
        Ok(())
    }
}

/// Whether a text is an integer in canonical form that no other kind of value holds.
pub(super) fn is_big_int(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let canonical = !digits.starts_with('0') && digits.bytes().all(|c| c.is_ascii_digit());
    let beyond = text.parse::<i64>().is_err() && text.parse::<u64>().is_err();
    canonical && beyond && (1..=MAX_INT_DIGITS).contains(&digits.len())
}

/// A key as JSON has it, where all keys are strings.
pub(super) fn key_text(key: &Key) -> Cow<'_, str> {
    match key {
        Key::Int(key) => Cow::Owned(format!("#{key}")),
        Key::Str(key) if key.starts_with(['#', '$']) => Cow::Owned(format!("${key}")),
        Key::Str(key) => Cow::Borrowed(key),
    }
}

/// What JSON has no number for. The NaN that arithmetic gives most often has a short text, others
/// their bits.
pub(super) fn special_float(x: f64) -> String {
    match x {
        f64::INFINITY => "inf".into(),
        f64::NEG_INFINITY => "-inf".into(),
        _ if x.to_bits() == PLAIN_NAN => "nan".into(),
        _ => format!("nan:{:016x}", x.to_bits()),
    }
}

pub(super) const PLAIN_NAN: u64 = 0x7ff8_0000_0000_0000;
