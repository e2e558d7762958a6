//! Trees: what a file holds, with exact types.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::real::Dtype;
use crate::room;

/// What a file holds: the values of a Python program that survive with their exact types.
///
/// Two trees are equal where all their bits are: a NaN equals itself, `0.0` and `-0.0` differ, and so
/// do a list and a tuple.
#[derive(Debug, Clone)]
pub enum Tree {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An integer that fits 64 bits with a sign.
    Int(i64),
    /// An integer above [`i64::MAX`]; smaller ones are [`Tree::Int`]. [`Tree::from`] chooses.
    UInt(u64),
    /// An integer beyond 64 bits, in decimal digits without leading zeros, with a `-` if it is negative.
    BigInt(String),
    /// A float.
    Float(f64),
    /// A string.
    Str(String),
    /// A list.
    List(Vec<Tree>),
    /// A tuple.
    Tuple(Vec<Tree>),
    /// A dict in its order. Keys are distinct.
    Dict(Vec<(Key, Tree)>),
    /// A NumPy scalar: the shape is empty.
    Scalar(TensorData),
    /// An array.
    Tensor(TensorData),
}

/// A key of a dict. The string `"1"` and the integer 1 are different keys.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// A string.
    Str(String),
    /// An integer.
    Int(i64),
}

/// An array by value: C order, little-endian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorData {
    /// What it stores.
    pub dtype: DataType,
    /// Extent of each axis; empty for a single number.
    pub shape: Vec<usize>,
    /// The elements' bytes.
    pub bytes: Bytes,
}

/// Immutable bytes, shared by their clones.
#[derive(Clone)]
pub struct Bytes(Memory);

#[derive(Clone)]
enum Memory {
    Own(Arc<Vec<u8>>),
    Lent(Arc<dyn AsRef<[u8]> + Send + Sync>),
}

/// Element type of an array in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the variants are NumPy's own names")]
pub enum DataType {
    Bool,
    Int8,
    Int16,
    Int32,
    Int64,
    UInt8,
    UInt16,
    UInt32,
    UInt64,
    Float16,
    BFloat16,
    Float32,
    Float64,
    Complex64,
    Complex128,
}

impl DataType {
    /// Every type.
    pub const ALL: [Self; 15] = [
        Self::Bool,
        Self::Int8,
        Self::Int16,
        Self::Int32,
        Self::Int64,
        Self::UInt8,
        Self::UInt16,
        Self::UInt32,
        Self::UInt64,
        Self::Float16,
        Self::BFloat16,
        Self::Float32,
        Self::Float64,
        Self::Complex64,
        Self::Complex128,
    ];

    /// NumPy's name, name in the container, bytes of one element.
    const fn facts(self) -> (&'static str, &'static str, usize) {
        match self {
            Self::Bool => ("bool", "BOOL", 1),
            Self::Int8 => ("int8", "I8", 1),
            Self::Int16 => ("int16", "I16", 2),
            Self::Int32 => ("int32", "I32", 4),
            Self::Int64 => ("int64", "I64", 8),
            Self::UInt8 => ("uint8", "U8", 1),
            Self::UInt16 => ("uint16", "U16", 2),
            Self::UInt32 => ("uint32", "U32", 4),
            Self::UInt64 => ("uint64", "U64", 8),
            Self::Float16 => ("float16", "F16", 2),
            Self::BFloat16 => ("bfloat16", "BF16", 2),
            Self::Float32 => ("float32", "F32", 4),
            Self::Float64 => ("float64", "F64", 8),
            Self::Complex64 => ("complex64", "C64", 8),
            // safetensors has no such type: two float64 on a last axis, noted in the structure.
            Self::Complex128 => ("complex128", "F64", 16),
        }
    }

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        self.facts().2
    }

    /// NumPy's name.
    pub const fn name(self) -> &'static str {
        self.facts().0
    }

    /// The name in the safetensors header. complex128 has none of its own and gives that of its halves.
    pub const fn container_name(self) -> &'static str {
        self.facts().1
    }

    /// By NumPy's name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.name() == name)
    }

    /// By the name in the safetensors header; never complex128.
    pub fn from_container_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.container_name() == name)
    }

    /// The type of the engine's arrays with these bits, if the engine has it.
    pub fn engine(self) -> Option<Dtype> {
        Dtype::ALL.into_iter().find(|&dtype| Self::from(dtype) == self)
    }
}

impl fmt::Display for DataType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl From<Dtype> for DataType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F16 => Self::Float16,
            Dtype::BF16 => Self::BFloat16,
            Dtype::F32 => Self::Float32,
            Dtype::F64 => Self::Float64,
            Dtype::C64 => Self::Complex64,
            Dtype::C128 => Self::Complex128,
        }
    }
}

/// Bytes of an array, or nothing where memory could never hold it. As in NumPy, an axis of extent 0
/// does not excuse the others.
pub(super) fn byte_count(dtype: DataType, shape: &[usize]) -> Option<usize> {
    let mut extents = shape.iter().filter(|&&axis| axis != 0);
    let bytes = extents.try_fold(dtype.size(), |n, &axis| n.checked_mul(axis))?;
    isize::try_from(bytes).ok()?;
    Some(if shape.contains(&0) { 0 } else { bytes })
}

impl TensorData {
    /// An array whose bytes fit its shape.
    pub fn new(dtype: DataType, shape: Vec<usize>, bytes: impl Into<Bytes>) -> Result<Self> {
        let tensor = Self { dtype, shape, bytes: bytes.into() };
        tensor.check("array", "its data")?;
        Ok(tensor)
    }

    pub(super) fn check(&self, place: &str, name: &str) -> Result<()> {
        let wanted = byte_count(self.dtype, &self.shape);
        if wanted == Some(self.bytes.len()) {
            return Ok(());
        }
        let allowed = match wanted {
            Some(wanted) => format!("{wanted} bytes for shape {:?} of {}", self.shape, self.dtype),
            None => format!("of a shape that fits in memory, not {:?}", self.shape),
        };
        Err(Error::refuse(ErrorKind::Value, place, name, allowed, format!("{} bytes", self.bytes.len())))
    }

    /// The number of an array of one element without axes.
    pub(super) fn number(&self) -> Option<Tree> {
        if !self.shape.is_empty() {
            return None;
        }
        let bytes: &[u8] = &self.bytes;
        Some(match self.dtype {
            DataType::Bool => Tree::Bool(bytes.first()? & 1 == 1),
            DataType::Int32 => Tree::Int(i32::from_le_bytes(bytes.try_into().ok()?).into()),
            DataType::Int64 => Tree::Int(i64::from_le_bytes(bytes.try_into().ok()?)),
            DataType::UInt64 => u64::from_le_bytes(bytes.try_into().ok()?).into(),
            DataType::Float32 => Tree::Float(f32::from_le_bytes(bytes.try_into().ok()?).into()),
            DataType::Float64 => Tree::Float(f64::from_le_bytes(bytes.try_into().ok()?)),
            _ => return None,
        })
    }
}

impl Bytes {
    /// Memory of somebody else, who should leave it alone while it is used. A save notices if it changes between its
    /// checksum and its writing.
    pub fn lent(memory: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Self {
        Self(Memory::Lent(memory))
    }

    /// Whether somebody else could change them.
    pub fn are_lent(&self) -> bool {
        matches!(self.0, Memory::Lent(_))
    }

    /// The bytes alone; without a copy where nobody shares them.
    pub fn into_vec(self) -> Result<Vec<u8>> {
        let copied = |bytes: &[u8]| room::copied(bytes, "a copy of an array");
        match self.0 {
            Memory::Own(owner) => Arc::try_unwrap(owner).or_else(|shared| copied(&shared)),
            Memory::Lent(memory) => copied((*memory).as_ref()),
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Memory::Own(owner) => owner,
            Memory::Lent(memory) => (**memory).as_ref(),
        }
    }
}

impl PartialEq for Bytes {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Bytes {}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Memory::Own(Arc::new(bytes)))
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

impl Tree {
    /// How messages call it: `a list`, `a float32 array of shape [3]`.
    pub fn describe(&self) -> String {
        match self {
            Self::None => "None".into(),
            Self::Bool(true) => "True".into(),
            Self::Bool(false) => "False".into(),
            Self::Int(x) => format!("the integer {x}"),
            Self::UInt(x) => format!("the integer {x}"),
            Self::BigInt(_) => "an integer beyond 64 bits".into(),
            Self::Float(x) => format!("the float {x:?}"),
            Self::Str(_) => "a string".into(),
            Self::List(_) => "a list".into(),
            Self::Tuple(_) => "a tuple".into(),
            Self::Dict(_) => "a dict".into(),
            Self::Scalar(t) => format!("a {} scalar", t.dtype),
            Self::Tensor(t) => format!("a {} array of shape {:?}", t.dtype, t.shape),
        }
    }

    /// The value of a string key, where this is a dict that has it.
    pub fn get(&self, key: &str) -> Option<&Self> {
        let Self::Dict(items) = self else { return None };
        items.iter().find(|(k, _)| matches!(k, Key::Str(k) if k == key)).map(|(_, value)| value)
    }

    /// A dict with string keys.
    pub fn dict<const N: usize>(items: [(&str, Self); N]) -> Self {
        Self::Dict(items.into_iter().map(|(key, value)| (key.into(), value)).collect())
    }
}

impl PartialEq for Tree {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::None, Self::None) => true,
            (Self::Bool(a), Self::Bool(b)) => a == b,
            (Self::Int(a), Self::Int(b)) => a == b,
            (Self::UInt(a), Self::UInt(b)) => a == b,
            (Self::Float(a), Self::Float(b)) => a.to_bits() == b.to_bits(),
            (Self::BigInt(a), Self::BigInt(b)) | (Self::Str(a), Self::Str(b)) => a == b,
            (Self::List(a), Self::List(b)) | (Self::Tuple(a), Self::Tuple(b)) => a == b,
            (Self::Dict(a), Self::Dict(b)) => a == b,
            (Self::Scalar(a), Self::Scalar(b)) | (Self::Tensor(a), Self::Tensor(b)) => a == b,
            _ => false,
        }
    }
}

impl Eq for Tree {}

impl From<u64> for Tree {
    fn from(x: u64) -> Self {
        i64::try_from(x).map_or(Self::UInt(x), Self::Int)
    }
}

impl From<&str> for Tree {
    fn from(text: &str) -> Self {
        Self::Str(text.into())
    }
}

impl From<&str> for Key {
    fn from(text: &str) -> Self {
        Self::Str(text.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_found_by_its_names() {
        for t in DataType::ALL {
            assert_eq!(DataType::from_name(t.name()), Some(t));
            let stored = if t == DataType::Complex128 { DataType::Float64 } else { t };
            assert_eq!(DataType::from_container_name(t.container_name()), Some(stored));
        }
    }

    #[test]
    fn sizes_are_checked_arithmetic() {
        assert_eq!(byte_count(DataType::Float32, &[]), Some(4));
        assert_eq!(byte_count(DataType::Float32, &[3, 0]), Some(0));
        assert_eq!(byte_count(DataType::Float32, &[usize::MAX, 2]), None);
        assert_eq!(byte_count(DataType::Float32, &[0, usize::MAX]), None);
        assert_eq!(byte_count(DataType::Int8, &[isize::MAX as usize + 1]), None);
    }

    #[test]
    fn bytes_share_and_give_back_their_memory() {
        let bytes = Bytes::from(vec![1, 2, 3, 4]);
        let address = bytes.as_ptr();
        let shared = bytes.clone();
        assert_eq!(shared.as_ptr(), address);
        drop(shared);
        let vec = bytes.into_vec().unwrap();
        assert_eq!(vec.as_ptr(), address);
    }

    #[test]
    fn equality_is_of_bits() {
        assert_eq!(Tree::Float(f64::NAN), Tree::Float(f64::NAN));
        assert_ne!(Tree::Float(0.0), Tree::Float(-0.0));
        assert_ne!(Tree::List(vec![]), Tree::Tuple(vec![]));
        assert_ne!(Tree::Int(1), Tree::Float(1.0));
    }

    #[test]
    fn an_array_must_fit_its_data() {
        let error = TensorData::new(DataType::Float32, vec![2], vec![0; 7]).unwrap_err();
        assert_eq!(error.to_string(), "array: its data must be 8 bytes for shape [2] of float32, got 7 bytes");
    }
}
