//! The store: every slot and step count, by parameter; and its serializable form, [`StateDict`].

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::de::Error as _;
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::Result;
use crate::hyper::Value;
use crate::real::Dtype;
use crate::room;
use crate::rule::{ScalarSlots, SlotSet};
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

    /// Real numbers: complex elements are two.
    pub fn reals(&self) -> usize {
        self.len() * self.dtype.parts()
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
    /// Its real numbers.
    pub reals: usize,
    /// The group it belongs to.
    pub group: usize,
    /// Updates applied to it.
    pub step: u64,
    /// Slots by position in the rule's declaration. On the CPU, allocated when first needed; on a GPU
    /// the device holds them.
    pub slots: Vec<Option<Arc<Buffer>>>,
    /// The slots that it may ever have.
    pub possible: SlotSet,
    /// Scalar slots, in the order of the declaration.
    pub scalars: ScalarSlots,
    /// How messages call it, where that is neither its name nor its number.
    pub title: Option<String>,
}

impl Entry {
    /// A parameter that was never updated.
    pub fn new(info: ParamInfo, group: usize, slots: usize, scalars: ScalarSlots) -> Self {
        let (reals, slots, possible) = (info.reals(), vec![None; slots], SlotSet::EMPTY);
        Self { reals, info, group, step: 0, slots, possible, scalars, title: None }
    }

    /// How messages call it.
    pub fn label(&self, index: usize) -> String {
        self.title.clone().unwrap_or_else(|| self.info.label(index))
    }

    /// Allocates the slots that are missing, each of the shape it is given; returns which were.
    pub fn ensure(&mut self, wanted: SlotSet, shape: impl Fn(usize) -> Option<Vec<usize>>) -> Result<SlotSet> {
        let mut fresh = SlotSet::EMPTY;
        for k in wanted.iter() {
            if self.slots[k].is_none() {
                let elements: usize = shape(k).map_or(0, |shape| shape.iter().product());
                let (part, parts) = (self.info.dtype.of_state().part(), self.info.dtype.parts());
                match Buffer::zeroed(elements * parts, part) {
                    Ok(buffer) => self.slots[k] = Some(Arc::new(buffer)),
                    Err(error) => {
                        self.release(fresh);
                        return Err(error);
                    }
                }
                fresh = fresh.with(k);
            }
        }
        Ok(fresh)
    }

    /// Takes slots back that [`Entry::ensure`] reported as fresh.
    pub fn release(&mut self, fresh: SlotSet) {
        for k in fresh.iter() {
            self.slots[k] = None;
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

/// A number as text formats hold it, which have no infinities.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Number {
    Finite(f64),
    Other(String),
}

impl From<f64> for Number {
    fn from(x: f64) -> Self {
        if x.is_finite() { Self::Finite(x) } else { Self::Other(x.to_string()) }
    }
}

impl Number {
    fn value<E: serde::de::Error>(&self) -> std::result::Result<f64, E> {
        match self {
            Self::Finite(x) => Ok(*x),
            Self::Other(text) => text.parse().map_err(|_| E::custom("a number cannot be read")),
        }
    }
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

    /// The same numbers in the dtype that state of this dtype is kept in.
    pub(crate) fn widened(&self) -> Result<Self> {
        Self::from_numbers(self.dtype.of_state(), self.shape.clone(), &self.numbers()?)
    }

    /// Its real numbers: a complex element is two.
    pub(crate) fn numbers(&self) -> Result<Vec<f64>> {
        const WHAT: &str = "the numbers of an array";
        let pairs = || self.bytes.as_chunks().0.iter();
        match self.dtype.part() {
            Dtype::F16 => room::listed(pairs().map(|b| half::f16::from_le_bytes(*b).into()), WHAT),
            Dtype::BF16 => room::listed(pairs().map(|b| half::bf16::from_le_bytes(*b).into()), WHAT),
            Dtype::F64 => room::listed(self.bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)), WHAT),
            _ => room::listed(self.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b).into()), WHAT),
        }
    }

    /// An array of such real numbers.
    pub(crate) fn from_numbers(dtype: Dtype, shape: Vec<usize>, numbers: &[f64]) -> Result<Self> {
        let mut bytes = Vec::new();
        room::reserve(&mut bytes, numbers.len().saturating_mul(dtype.part().size()), "an array of state")?;
        match dtype.part() {
            Dtype::F16 => bytes.extend(numbers.iter().flat_map(|&x| half::f16::from_f64(x).to_le_bytes())),
            Dtype::BF16 => bytes.extend(numbers.iter().flat_map(|&x| half::bf16::from_f64(x).to_le_bytes())),
            Dtype::F64 => bytes.extend(numbers.iter().flat_map(|x| x.to_le_bytes())),
            _ => bytes.extend(numbers.iter().flat_map(|&x| (x as f32).to_le_bytes())),
        }
        Ok(Self { dtype, shape, bytes })
    }
}

impl Serialize for Array {
    fn serialize<S: Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        if !s.is_human_readable() {
            return (self.dtype, &self.shape, &self.bytes).serialize(s);
        }
        let numbers = self.numbers().map_err(S::Error::custom)?;
        let data = numbers.into_iter().map(Number::from).collect();
        Readable { dtype: self.dtype, shape: self.shape.clone(), data }.serialize(s)
    }
}

impl<'de> Deserialize<'de> for Array {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        let array = if d.is_human_readable() {
            let Readable { dtype, shape, data } = Readable::deserialize(d)?;
            let numbers = data.iter().map(Number::value).collect::<std::result::Result<Vec<f64>, D::Error>>()?;
            Self::from_numbers(dtype, shape, &numbers).map_err(D::Error::custom)?
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

/// One value of a parameter's state.
#[derive(Debug, Clone, PartialEq)]
pub enum StateValue {
    /// Nothing.
    None,
    /// A count.
    Count(u64),
    /// A number.
    Number(f64),
    /// An array.
    Array(Array),
    /// Several of these.
    List(Vec<StateValue>),
}

impl StateValue {
    /// What it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Count(_) | Self::Number(_) => "a number",
            Self::Array(_) => "an array",
            Self::List(_) => "a list",
        }
    }

    /// The array, if it is one.
    pub fn array(&self) -> Option<&Array> {
        if let Self::Array(array) = self { Some(array) } else { None }
    }

    /// The number, if it is one; an array of one element counts.
    pub fn number(&self) -> Option<f64> {
        match self {
            Self::Count(n) => Some(*n as f64),
            Self::Number(x) => Some(*x),
            Self::Array(array) if array.bytes.len() == array.dtype.part().size() => {
                array.numbers().ok()?.first().copied()
            }
            _ => None,
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged, remote = "StateValue")]
enum PlainState {
    None,
    Count(u64),
    Number(#[serde(with = "number")] f64),
    Array(Array),
    List(Vec<StateValue>),
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "StateValue")]
enum TaggedState {
    None,
    Count(u64),
    Number(f64),
    Array(Array),
    List(Vec<StateValue>),
}

/// A number by way of [`Number`].
mod number {
    use super::{Deserialize, Deserializer, Number, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(x: &f64, s: S) -> Result<S::Ok, S::Error> {
        Number::from(*x).serialize(s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
        Number::deserialize(d)?.value()
    }
}

impl Serialize for StateValue {
    fn serialize<S: Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        if s.is_human_readable() { PlainState::serialize(self, s) } else { TaggedState::serialize(self, s) }
    }
}

impl<'de> Deserialize<'de> for StateValue {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        if d.is_human_readable() { PlainState::deserialize(d) } else { TaggedState::deserialize(d) }
    }
}

/// State of one parameter by value.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ParamState {
    /// Updates applied to it.
    pub step: u64,
    /// Everything else by torch's key.
    pub slots: BTreeMap<String, StateValue>,
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

/// What a state was made for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParamFacts {
    /// Extent of each axis of the parameter.
    pub shape: Vec<usize>,
    /// What it stores.
    pub dtype: Dtype,
}

impl ParamFacts {
    /// Of a parameter.
    pub fn of(info: &ParamInfo) -> Self {
        Self { shape: info.shape.clone(), dtype: info.dtype }
    }
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
    /// Updates left out because a gradient was not finite.
    #[serde(default)]
    pub skip_count: u64,
    /// Of a method that evaluates several times in a step: a mark of the point its last step ended at, if that was
    /// never evaluated.
    #[serde(default)]
    pub unseen_end: Option<u64>,
    /// The groups, in order.
    pub groups: Vec<GroupState>,
    /// Shape and dtype of the parameters by index, where they are known: a state from elsewhere does not say.
    #[serde(default)]
    pub parameters: BTreeMap<usize, ParamFacts>,
    /// State by parameter index; a parameter never updated is absent.
    pub state: BTreeMap<usize, ParamState>,
}

/// The layout version this library writes.
pub const STATE_FORMAT: u32 = 1;
