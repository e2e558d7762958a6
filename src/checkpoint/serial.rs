//! Trees for serde: text formats hold the structure with the numbers in it, binary ones the bytes of the file.

use std::fmt;

use serde::de::{DeserializeSeed as _, Error as _, Visitor};
use serde::ser::{Error as _, SerializeMap as _, SerializeSeq as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::json::{Json, Strict, shown};
use super::read::{from_bytes, grown, special_float as special_from};
use super::tree::{DataType, TensorData, Tree, byte_count};
use super::write::{Image, key_text, special_float, to_bytes};
use crate::error::{Error, ErrorKind, Result};

/// Starts messages about JSON that holds tensors.
const PLACE: &str = "JSON";

impl Serialize for Tree {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if !s.is_human_readable() {
            return s.serialize_bytes(&to_bytes(self).map_err(S::Error::custom)?);
        }
        // What no file holds, no text does.
        Image::unsealed(self, PLACE).map_err(S::Error::custom)?;
        Checked(self).serialize(s)
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        if !d.is_human_readable() {
            return d.deserialize_byte_buf(FileBytes);
        }
        let tree = grown(Strict.deserialize(d)?).map_err(D::Error::custom)?;
        Image::unsealed(&tree, PLACE).map_err(D::Error::custom)?;
        Ok(tree)
    }
}

struct FileBytes;

impl Visitor<'_> for FileBytes {
    type Value = Tree;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the bytes of a checkpoint")
    }

    fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Tree, E> {
        from_bytes(bytes).map_err(E::custom)
    }
}

/// A tree, or a part of one, that a file could hold.
struct Checked<'t>(&'t Tree);

impl Serialize for Checked<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Tree::None => s.serialize_unit(),
            Tree::Bool(x) => s.serialize_bool(*x),
            Tree::Int(x) => s.serialize_i64(*x),
            Tree::UInt(x) => s.serialize_u64(*x),
            Tree::BigInt(digits) => tagged(s, "$int", digits),
            Tree::Float(x) if x.is_finite() => s.serialize_f64(*x),
            Tree::Float(x) => tagged(s, "$float", &special_float(*x)),
            Tree::Str(text) => s.serialize_str(text),
            Tree::List(items) => s.collect_seq(items.iter().map(Checked)),
            Tree::Tuple(items) => tagged(s, "$tuple", &items.iter().map(Checked).collect::<Vec<_>>()),
            Tree::Dict(items) => s.collect_map(items.iter().map(|(key, value)| (key_text(key), Checked(value)))),
            Tree::Scalar(tensor) => tagged(s, "$scalar", &Inline(tensor)),
            Tree::Tensor(tensor) => tagged(s, "$tensor", &Inline(tensor)),
        }
    }
}

fn tagged<S: Serializer>(s: S, tag: &str, value: &(impl Serialize + ?Sized)) -> Result<S::Ok, S::Error> {
    let mut map = s.serialize_map(Some(1))?;
    map.serialize_entry(tag, value)?;
    map.end()
}

/// `{"dtype": "float32", "shape": [2], "data": [0.5, "nan"]}`.
struct Inline<'t>(&'t TensorData);

impl Serialize for Inline<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut map = s.serialize_map(Some(3))?;
        map.serialize_entry("dtype", self.0.dtype.name())?;
        map.serialize_entry("shape", &self.0.shape)?;
        map.serialize_entry("data", &Numbers(self.0))?;
        map.end()
    }
}

/// The numbers of an array in C order, a complex one as two.
struct Numbers<'t>(&'t TensorData);

impl Serialize for Numbers<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let (dtype, size) = real_part(self.0.dtype);
        let mut seq = s.serialize_seq(Some(self.0.bytes.len() / size))?;
        for bytes in self.0.bytes.chunks_exact(size) {
            let bits = bits_of(bytes);
            let signed = sign_extended(bits, size);
            match dtype {
                DataType::Bool => seq.serialize_element(&(bits != 0))?,
                DataType::Int8 | DataType::Int16 | DataType::Int32 | DataType::Int64 => {
                    seq.serialize_element(&signed)?
                }
                DataType::UInt8 | DataType::UInt16 | DataType::UInt32 | DataType::UInt64 => {
                    seq.serialize_element(&bits)?;
                }
                _ => {
                    let x = float_of(dtype, bits);
                    if x.is_nan() {
                        // Its own bits, which a conversion to another width might change.
                        seq.serialize_element(&format!("nan:{bits:0width$x}", width = 2 * size))?;
                    } else if x.is_infinite() {
                        seq.serialize_element(&special_float(x))?;
                    } else {
                        seq.serialize_element(&x)?;
                    }
                }
            }
        }
        seq.end()
    }
}

/// The type of the reals in an array, and their bytes.
fn real_part(dtype: DataType) -> (DataType, usize) {
    match dtype {
        DataType::Complex64 => (DataType::Float32, 4),
        DataType::Complex128 => (DataType::Float64, 8),
        real => (real, real.size()),
    }
}

fn bits_of(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |bits, &byte| bits << 8 | u64::from(byte))
}

fn sign_extended(bits: u64, size: usize) -> i64 {
    let unused = 64 - 8 * size;
    (bits << unused) as i64 >> unused
}

/// The value of a float's bits. The types of the arms hold just these bits.
fn float_of(dtype: DataType, bits: u64) -> f64 {
    match dtype {
        DataType::Float16 => half::f16::from_bits(bits as u16).into(),
        DataType::BFloat16 => half::bf16::from_bits(bits as u16).into(),
        DataType::Float32 => f32::from_bits(bits as u32).into(),
        _ => f64::from_bits(bits),
    }
}

fn bits_of_float(dtype: DataType, x: f64) -> u64 {
    match dtype {
        DataType::Float16 => half::f16::from_f64(x).to_bits().into(),
        DataType::BFloat16 => half::bf16::from_f64(x).to_bits().into(),
        DataType::Float32 => (x as f32).to_bits().into(),
        _ => x.to_bits(),
    }
}

/// The tensor that such fields describe.
pub(super) fn inline_tensor(fields: Vec<(String, Json)>) -> Result<TensorData> {
    let refuse =
        |name: &str, allowed: &str, got: String| Err(Error::refuse(ErrorKind::File, PLACE, name, allowed, got));
    let (mut dtype, mut shape, mut data) = (None, None, None);
    for (key, value) in fields {
        match (key.as_str(), value) {
            ("dtype", Json::Str(name)) => dtype = DataType::from_name(&name),
            ("shape", Json::List(extents)) => shape = Some(extents),
            ("data", Json::List(numbers)) => data = Some(numbers),
            _ => return refuse("a field of a tensor", "a dtype, or lists as shape and data", shown(&key)),
        }
    }
    let (Some(dtype), Some(extents), Some(numbers)) = (dtype, shape, data) else {
        return refuse("a tensor", "of a known dtype, with shape and data", "another".into());
    };
    let mut shape = Vec::with_capacity(extents.len());
    for extent in &extents {
        match extent {
            Json::Int(x) if usize::try_from(*x).is_ok() => shape.push(*x as usize),
            other => return refuse("shape", "of integers from 0", other.describe()),
        }
    }
    let (real, size) = real_part(dtype);
    if byte_count(dtype, &shape) != numbers.len().checked_mul(size) {
        return refuse("data", "as many numbers as the shape asks for", format!("{} for {shape:?}", numbers.len()));
    }
    let mut bytes = Vec::with_capacity(numbers.len() * size);
    for number in &numbers {
        let Some(bits) = parsed(real, size, number) else {
            return refuse("data", &format!("of numbers that {dtype} holds exactly"), number.describe());
        };
        bytes.extend_from_slice(&bits.to_le_bytes()[..size]);
    }
    TensorData::new(dtype, shape, bytes)
}

/// The bits of a number that the type holds exactly.
fn parsed(dtype: DataType, size: usize, number: &Json) -> Option<u64> {
    let whole = || match number {
        Json::Int(x) => Some(i128::from(*x)),
        Json::UInt(x) => Some(i128::from(*x)),
        _ => None,
    };
    let bits = 8 * size as u32;
    match dtype {
        DataType::Bool => match number {
            Json::Bool(x) => Some(u64::from(*x)),
            _ => None,
        },
        DataType::Int8 | DataType::Int16 | DataType::Int32 | DataType::Int64 => {
            let end = 1i128 << (bits - 1);
            whole().filter(|x| (-end..end).contains(x)).map(|x| x as u64)
        }
        DataType::UInt8 | DataType::UInt16 | DataType::UInt32 | DataType::UInt64 => {
            whole().filter(|x| (0..1i128 << bits).contains(x)).map(|x| x as u64)
        }
        _ => {
            let x = match number {
                Json::Str(text) if text.starts_with("nan:") => {
                    let digits = text.strip_prefix("nan:").filter(|digits| digits.len() == 2 * size)?;
                    let bits = u64::from_str_radix(digits, 16).ok()?;
                    return float_of(dtype, bits).is_nan().then_some(bits);
                }
                Json::Str(text) => special_from(text).filter(|x| x.is_infinite())?,
                Json::Float(x) => *x,
                Json::Int(x) if (*x as f64) as i128 == i128::from(*x) => *x as f64,
                _ => return None,
            };
            let bits = bits_of_float(dtype, x);
            (float_of(dtype, bits).to_bits() == x.to_bits()).then_some(bits)
        }
    }
}
