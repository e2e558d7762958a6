//! The store: every slot and step count, by parameter; and its serializable form, [`StateDict`].

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::Result;
use crate::hyper::Value;
use crate::real::Dtype;
use crate::tensor::Buffer;

/// What is known of a parameter: its name if it has one, shape and dtype.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamInfo {
    /// The user's name.
    pub name: Option<String>,
    /// Extent of each axis; empty for a single number.
    pub shape: Vec<usize>,
    /// What it stores.
    pub dtype: Dtype,
    /// On a GPU: whether the device holds the truth between steps. Without meaning on the CPU.
    pub resident: bool,
}

impl ParamInfo {
    /// A parameter of one axis.
    pub fn vector(name: &str, len: usize, dtype: Dtype) -> Self {
        Self { name: Some(name.into()), shape: vec![len], dtype, resident: false }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How messages call it.
    pub fn label(&self, index: usize) -> String {
        match &self.name {
            Some(name) => format!("parameter {name:?}"),
            None => format!("parameter {index}"),
        }
    }
}

/// State of one parameter.
#[derive(Debug)]
pub struct Entry {
    /// What the parameter is.
    pub info: ParamInfo,
    /// The group it belongs to.
    pub group: usize,
    /// Updates applied to it.
    pub step: u64,
    /// Slots by position in the rule's declaration. On the CPU, allocated when first needed; on a GPU
    /// the device holds them.
    pub slots: Vec<Option<Arc<Buffer>>>,
}

impl Entry {
    /// Allocates the first `count` slots where they are missing; returns which were (bit k: slot k).
    pub fn ensure(&mut self, count: usize) -> Result<u8> {
        let mut fresh = 0;
        for k in 0..count {
            if self.slots[k].is_none() {
                self.slots[k] = Some(Arc::new(Buffer::zeroed(self.info.len(), self.info.dtype)?));
                fresh |= 1 << k;
            }
        }
        Ok(fresh)
    }

    /// Takes slots back that [`Entry::ensure`] reported as fresh.
    pub fn release(&mut self, fresh: u8) {
        for (k, slot) in self.slots.iter_mut().enumerate() {
            if fresh & (1 << k) != 0 {
                *slot = None;
            }
        }
    }
}

/// An array by value: C order, little-endian.
///
/// In human-readable formats its numbers are written as numbers (non-finite ones as strings; the payload
/// of a NaN is not kept), in binary formats as bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// What it stores.
    pub dtype: Dtype,
    /// Extent of each axis.
    pub shape: Vec<usize>,
    /// The elements' bytes.
    pub bytes: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Number {
    Finite(f64),
    Other(String),
}

#[derive(Serialize, Deserialize)]
struct Readable {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<Number>,
}

impl Array {
    /// Elements that the shape asks for.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn numbers(&self) -> Vec<f64> {
        match self.dtype {
            Dtype::F32 => self.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b).into()).collect(),
            Dtype::F64 => self.bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
        }
    }

    fn from_numbers(dtype: Dtype, shape: Vec<usize>, numbers: &[f64]) -> Self {
        let bytes = match dtype {
            Dtype::F32 => numbers.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect(),
            Dtype::F64 => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        };
        Self { dtype, shape, bytes }
    }
}

impl Serialize for Array {
    fn serialize<S: Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        if !s.is_human_readable() {
            return (self.dtype, &self.shape, &self.bytes).serialize(s);
        }
        let number = |x: f64| if x.is_finite() { Number::Finite(x) } else { Number::Other(x.to_string()) };
        let data = self.numbers().into_iter().map(number).collect();
        Readable { dtype: self.dtype, shape: self.shape.clone(), data }.serialize(s)
    }
}

impl<'de> Deserialize<'de> for Array {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        let array = if d.is_human_readable() {
            let Readable { dtype, shape, data } = Readable::deserialize(d)?;
            let number = |n: &Number| match n {
                Number::Finite(x) => Ok(*x),
                Number::Other(text) => text.parse().map_err(|_| D::Error::custom("an array element is no number")),
            };
            let numbers = data.iter().map(number).collect::<std::result::Result<Vec<f64>, _>>()?;
            Self::from_numbers(dtype, shape, &numbers)
        } else {
            let (dtype, shape, bytes) = Deserialize::deserialize(d)?;
            Self { dtype, shape, bytes }
        };
        let wanted = array.shape.iter().try_fold(array.dtype.size(), |n, &axis| n.checked_mul(axis));
        if wanted != Some(array.bytes.len()) {
            return Err(D::Error::custom("an array's shape does not fit its data"));
        }
        Ok(array)
    }
}

/// State of one parameter by value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ParamState {
    /// Updates applied to it.
    pub step: u64,
    /// Slots by torch's key.
    pub slots: BTreeMap<String, Array>,
}

/// One group by value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupState {
    /// Hyperparameters by name.
    pub hypers: BTreeMap<String, Value>,
    /// Indices of its parameters.
    pub params: Vec<usize>,
    /// Their names, if they have names.
    pub param_names: Option<Vec<String>>,
}

/// Everything an optimizer knows apart from the parameters' values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StateDict {
    /// Class name; `None` where the state comes from elsewhere and only has to fit.
    pub optimizer: Option<String>,
    /// Version of this layout.
    pub format: u32,
    /// Applied updates.
    pub update_count: u64,
    /// The groups, in order.
    pub groups: Vec<GroupState>,
    /// State by parameter index; a parameter never updated is absent.
    pub state: BTreeMap<usize, ParamState>,
}

/// The layout version this library writes.
pub const STATE_FORMAT: u32 = 1;
