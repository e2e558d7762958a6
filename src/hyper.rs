//! Hyperparameters: name, default and allowed range as data.
//!
//! One [`Hyper`] gives the check, the error message, the documentation and the Python signature test.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, ErrorKind, Result};

/// A hyperparameter's value as a user may set it.
///
/// Serialized as the plain value in human-readable formats, with its kind in binary ones.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value {
    /// A switch.
    Bool(bool),
    /// A number.
    Float(f64),
    /// Two numbers, such as Adam's betas.
    Pair([f64; 2]),
}

#[derive(Serialize, Deserialize)]
#[serde(untagged, remote = "Value")]
enum Plain {
    Bool(bool),
    Float(f64),
    Pair([f64; 2]),
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Value")]
enum Tagged {
    Bool(bool),
    Float(f64),
    Pair([f64; 2]),
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        if s.is_human_readable() { Plain::serialize(self, s) } else { Tagged::serialize(self, s) }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        if d.is_human_readable() { Plain::deserialize(d) } else { Tagged::deserialize(d) }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(b) => f.write_str(if *b { "True" } else { "False" }),
            Self::Float(x) => write!(f, "{x:?}"),
            Self::Pair([a, b]) => write!(f, "({a:?}, {b:?})"),
        }
    }
}

/// What a hyperparameter may be. NaN fails every range.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Range {
    /// A finite number ≥ the bound.
    AtLeast(f64),
    /// A finite number.
    Finite,
    /// A number in `[low, high)`.
    From(f64, f64),
    /// A number in `[low, high]`.
    Within(f64, f64),
    /// Two numbers, each in `[low, high)`.
    PairFrom(f64, f64),
    /// A switch.
    Flag,
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(low) => write!(f, "a finite number >= {low}"),
            Self::Finite => f.write_str("a finite number"),
            Self::From(low, high) => write!(f, "a number in [{low}, {high})"),
            Self::Within(low, high) => write!(f, "a number in [{low}, {high}]"),
            Self::PairFrom(low, high) => write!(f, "two numbers in [{low}, {high})"),
            Self::Flag => f.write_str("True or False"),
        }
    }
}

/// One hyperparameter of a rule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hyper {
    /// torch's name.
    pub name: &'static str,
    /// What it is without being set.
    pub default: Value,
    /// What it may be.
    pub range: Range,
    /// One line for the documentation.
    pub doc: &'static str,
}

impl Hyper {
    /// Checks one value; `place` names the optimizer (and group) in the message.
    pub fn check(&self, place: &str, value: Value) -> Result<()> {
        let refuse = |name: String, allowed: String, got: String| {
            Err(Error::refuse(ErrorKind::Value, place, name, allowed, got))
        };
        let in_from = |x: f64, low: f64, high: f64| low <= x && x < high;
        match (self.range, value) {
            (Range::AtLeast(_) | Range::Finite | Range::From(..) | Range::Within(..), Value::Float(x)) => {
                let allowed = match self.range {
                    Range::AtLeast(low) => x.is_finite() && x >= low,
                    Range::From(low, high) => in_from(x, low, high),
                    Range::Within(low, high) => low <= x && x <= high,
                    _ => x.is_finite(),
                };
                if allowed { Ok(()) } else { refuse(self.name.into(), self.range.to_string(), value.to_string()) }
            }
            (Range::PairFrom(low, high), Value::Pair(pair)) => {
                match pair.iter().position(|&x| !in_from(x, low, high)) {
                    None => Ok(()),
                    Some(i) => refuse(
                        format!("{}[{i}]", self.name),
                        Range::From(low, high).to_string(),
                        Value::Float(pair[i]).to_string(),
                    ),
                }
            }
            (Range::Flag, Value::Bool(_)) => Ok(()),
            _ => Err(Error::refuse(ErrorKind::Type, place, self.name, self.range, value)),
        }
    }
}

/// The hyperparameters of one group: a value for each [`Hyper`] of its rule.
#[derive(Debug, Clone, PartialEq)]
pub struct Hypers {
    declared: &'static [Hyper],
    values: Vec<Value>,
}

impl Hypers {
    /// The defaults.
    pub fn new(declared: &'static [Hyper]) -> Self {
        Self { declared, values: declared.iter().map(|h| h.default).collect() }
    }

    /// What is declared, in order.
    pub fn declared(&self) -> &'static [Hyper] {
        self.declared
    }

    /// Every name with its value, in declaration order.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, Value)> + '_ {
        self.declared.iter().map(|h| h.name).zip(self.values.iter().copied())
    }

    fn index(&self, name: &str) -> Option<usize> {
        self.declared.iter().position(|h| h.name == name)
    }

    /// The value of `name`, if it is a hyperparameter of this rule.
    pub fn get(&self, name: &str) -> Option<Value> {
        self.index(name).map(|i| self.values[i])
    }

    /// Checks the range and sets; on an error the old value stays.
    pub fn set(&mut self, place: &str, name: &str, value: Value) -> Result<()> {
        let Some(i) = self.index(name) else {
            let known: Vec<_> = self.declared.iter().map(|h| h.name).collect();
            return Err(Error::refuse(
                ErrorKind::Name,
                place,
                "hyperparameter",
                format!("one of {}", known.join(", ")),
                name,
            ));
        };
        self.declared[i].check(place, value)?;
        self.values[i] = value;
        Ok(())
    }

    /// A number that the rule declares. Asking for what is not declared is a defect of the rule.
    pub(crate) fn float(&self, name: &str) -> f64 {
        match self.get(name) {
            Some(Value::Float(x)) => x,
            other => unreachable!("{name} is declared as a number, found {other:?}"),
        }
    }

    /// A pair that the rule declares.
    pub(crate) fn pair(&self, name: &str) -> [f64; 2] {
        match self.get(name) {
            Some(Value::Pair(x)) => x,
            other => unreachable!("{name} is declared as a pair, found {other:?}"),
        }
    }

    /// A switch; one that the rule does not declare is off.
    pub(crate) fn flag(&self, name: &str) -> bool {
        matches!(self.get(name), Some(Value::Bool(true)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LR: Hyper = Hyper { name: "lr", default: Value::Float(1e-3), range: Range::AtLeast(0.0), doc: "" };
    const BETAS: Hyper =
        Hyper { name: "betas", default: Value::Pair([0.9, 0.999]), range: Range::PairFrom(0.0, 1.0), doc: "" };

    #[test]
    fn messages_follow_the_sentence_form() {
        let message = |r: Result<()>| r.unwrap_err().to_string();
        assert_eq!(message(LR.check("Adam", Value::Float(f64::NAN))), "Adam: lr must be a finite number >= 0, got NaN");
        assert_eq!(
            message(BETAS.check("Adam", Value::Pair([0.9, 1.0]))),
            "Adam: betas[1] must be a number in [0, 1), got 1.0"
        );
        assert_eq!(
            message(BETAS.check("Adam", Value::Float(0.9))),
            "Adam: betas must be two numbers in [0, 1), got 0.9"
        );
    }

    #[test]
    fn a_refused_value_leaves_the_old_one() {
        static DECLARED: [Hyper; 1] = [LR];
        let mut hypers = Hypers::new(&DECLARED);
        hypers.set("Adam", "lr", Value::Float(0.5)).unwrap();
        assert!(hypers.set("Adam", "lr", Value::Float(f64::INFINITY)).is_err());
        assert!(hypers.set("Adam", "rate", Value::Float(0.1)).is_err());
        assert_eq!(hypers.get("lr"), Some(Value::Float(0.5)));
    }
}
