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
    /// Left to the optimizer.
    None,
    /// A switch.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number.
    Float(f64),
    /// Two numbers, such as Adam's betas.
    Pair([f64; 2]),
    /// Two numbers of which the first is left to the optimizer: `(None, x)`.
    HalfPair(f64),
    /// Three numbers.
    Triple([f64; 3]),
    /// The name of a choice.
    Choice(Choice),
}

/// A word that some hyperparameter of some rule may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// A line search to the strong Wolfe conditions.
    StrongWolfe,
    /// Muon's own factor on the learning rate.
    Original,
    /// The factor that gives Muon's update the size of Adam's.
    MatchRmsAdamw,
}

impl Choice {
    /// Every choice with its name.
    pub const ALL: [(Self, &'static str); 3] =
        [(Self::StrongWolfe, "strong_wolfe"), (Self::Original, "original"), (Self::MatchRmsAdamw, "match_rms_adamw")];

    /// The choice of this name.
    pub fn find(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, known)| *known == name).map(|(choice, _)| choice)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::ALL.into_iter().find(|(choice, _)| *choice == self).map_or("", |(_, name)| name)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged, remote = "Value")]
enum Plain {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Pair([f64; 2]),
    #[serde(with = "half")]
    HalfPair(f64),
    Triple([f64; 3]),
    Choice(Choice),
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Value")]
enum Tagged {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Pair([f64; 2]),
    HalfPair(f64),
    Triple([f64; 3]),
    Choice(Choice),
}

/// `(None, x)` as two items.
mod half {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(x: &f64, s: S) -> Result<S::Ok, S::Error> {
        ((), x).serialize(s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
        <((), f64)>::deserialize(d).map(|((), x)| x)
    }
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
            Self::None => f.write_str("None"),
            Self::Bool(b) => f.write_str(if *b { "True" } else { "False" }),
            Self::Int(n) => write!(f, "{n}"),
            Self::Float(x) => write!(f, "{x:?}"),
            Self::Pair([a, b]) => write!(f, "({a:?}, {b:?})"),
            Self::HalfPair(b) => write!(f, "(None, {b:?})"),
            Self::Triple([a, b, c]) => write!(f, "({a:?}, {b:?}, {c:?})"),
            Self::Choice(choice) => write!(f, "{:?}", choice.name()),
        }
    }
}

/// What a hyperparameter may be. NaN fails every range.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Range {
    /// A finite number ≥ the bound.
    AtLeast(f64),
    /// A finite number ≤ the bound.
    AtMost(f64),
    /// A finite number > the bound.
    Above(f64),
    /// A number ≥ the bound, or infinity.
    AtLeastOrInfinite(f64),
    /// A finite number.
    Finite,
    /// A number in `[low, high)`.
    From(f64, f64),
    /// A number in `[low, high]`.
    Within(f64, f64),
    /// Two numbers, each in `[low, high)`.
    PairFrom(f64, f64),
    /// Two finite numbers on either side of one that lies between: `low < a < middle < b`.
    PairAround(f64, f64),
    /// Two finite numbers in order: `low ≤ a ≤ b`.
    PairOrdered(f64),
    /// Two finite numbers ≥ the bound, the first of which may be None.
    HalfPair(f64),
    /// Three finite numbers.
    Triple,
    /// A whole number in `[low, high]`.
    Whole(i64, i64),
    /// None, or what the other range allows.
    OrNone(&'static Range),
    /// One of these words.
    OneOf(&'static [Choice]),
    /// A switch.
    Flag,
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(low) => write!(f, "a finite number >= {low}"),
            Self::AtMost(high) => write!(f, "a finite number <= {high}"),
            Self::Above(low) => write!(f, "a finite number > {low}"),
            Self::AtLeastOrInfinite(low) => write!(f, "a number >= {low}"),
            Self::Finite => f.write_str("a finite number"),
            Self::From(low, high) => write!(f, "a number in [{low}, {high})"),
            Self::Within(low, high) => write!(f, "a number in [{low}, {high}]"),
            Self::PairFrom(low, high) => write!(f, "two numbers in [{low}, {high})"),
            Self::PairAround(low, middle) => write!(f, "two finite numbers a, b with {low} < a < {middle} < b"),
            Self::PairOrdered(low) => write!(f, "two finite numbers a, b with {low} <= a <= b"),
            Self::HalfPair(low) => write!(f, "two finite numbers >= {low}, the first of which may be None"),
            Self::Triple => f.write_str("three finite numbers"),
            Self::Whole(low, i64::MAX) => write!(f, "a whole number >= {low}"),
            Self::Whole(low, high) => write!(f, "a whole number from {low} to {high}"),
            Self::OrNone(range) => write!(f, "None or {range}"),
            Self::OneOf(choices) => {
                let names: Vec<_> = choices.iter().map(|c| format!("{:?}", c.name())).collect();
                f.write_str(&names.join(" or "))
            }
            Self::Flag => f.write_str("True or False"),
        }
    }
}

/// How a value relates to a range.
enum Fit {
    Inside,
    /// Of the right type; where one of several numbers is to blame, its index and its own range.
    Outside(Option<(usize, Range)>),
    WrongType,
}

impl Value {
    fn is_identical(&self, other: &Self) -> bool {
        let same = |a: &[f64], b: &[f64]| a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits()));
        match (self, other) {
            (Self::Float(a), Self::Float(b)) | (Self::HalfPair(a), Self::HalfPair(b)) => same(&[*a], &[*b]),
            (Self::Pair(a), Self::Pair(b)) => same(a, b),
            (Self::Triple(a), Self::Triple(b)) => same(a, b),
            _ => self == other,
        }
    }
}

impl Range {
    /// The same value in the type that the range is declared in: a whole float as an integer, an integer
    /// as a float.
    fn settle(&self, value: Value) -> Value {
        // Floats of at most 2⁵³ stand for themselves.
        const EXACT: f64 = 9_007_199_254_740_992.0;
        match (self, value) {
            (Self::OrNone(range), value) => range.settle(value),
            (Self::Whole(..), Value::Float(x)) if x.fract() == 0.0 && x.abs() <= EXACT => Value::Int(x as i64),
            (Self::Whole(..), value) => value,
            (_, Value::Int(n)) => Value::Float(n as f64),
            (_, value) => value,
        }
    }

    fn fit(&self, value: Value) -> Fit {
        let inside = |yes: bool| if yes { Fit::Inside } else { Fit::Outside(None) };
        let each = |numbers: &[f64], range: Range| match numbers
            .iter()
            .position(|&x| !matches!(range.fit(Value::Float(x)), Fit::Inside))
        {
            None => Fit::Inside,
            Some(i) => Fit::Outside(Some((i, range))),
        };
        match (*self, value) {
            (Self::AtLeast(low), Value::Float(x)) => inside(x.is_finite() && x >= low),
            (Self::AtMost(high), Value::Float(x)) => inside(x.is_finite() && x <= high),
            (Self::Above(low), Value::Float(x)) => inside(x.is_finite() && x > low),
            (Self::AtLeastOrInfinite(low), Value::Float(x)) => inside(x >= low),
            (Self::Finite, Value::Float(x)) => inside(x.is_finite()),
            (Self::From(low, high), Value::Float(x)) => inside(low <= x && x < high),
            (Self::Within(low, high), Value::Float(x)) => inside(low <= x && x <= high),
            (Self::PairFrom(low, high), Value::Pair(pair)) => each(&pair, Self::From(low, high)),
            (Self::PairAround(low, middle), Value::Pair([a, b])) => {
                inside(low < a && a < middle && middle < b && b.is_finite())
            }
            (Self::PairOrdered(low), Value::Pair([a, b])) => inside(low <= a && a <= b && b.is_finite()),
            (Self::HalfPair(low), Value::Pair(pair)) => each(&pair, Self::AtLeast(low)),
            (Self::HalfPair(low), Value::HalfPair(b)) => match Self::AtLeast(low).fit(Value::Float(b)) {
                Fit::Inside => Fit::Inside,
                _ => Fit::Outside(Some((1, Self::AtLeast(low)))),
            },
            (Self::Triple, Value::Triple(three)) => each(&three, Self::Finite),
            (Self::Whole(low, high), Value::Int(n)) => inside(low <= n && n <= high),
            (Self::OrNone(_), Value::None) | (Self::Flag, Value::Bool(_)) => Fit::Inside,
            (Self::OrNone(range), value) => range.fit(value),
            (Self::OneOf(choices), Value::Choice(choice)) => inside(choices.contains(&choice)),
            _ => Fit::WrongType,
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
    /// Checks one value and returns it in the declared type; `place` names the optimizer (and group) in
    /// the message.
    pub fn check(&self, place: &str, value: Value) -> Result<Value> {
        let value = self.range.settle(value);
        match self.range.fit(value) {
            Fit::Inside => Ok(value),
            Fit::WrongType => Err(Error::refuse(ErrorKind::Type, place, self.name, self.range, value)),
            Fit::Outside(None) => Err(Error::refuse(ErrorKind::Value, place, self.name, self.range, value)),
            Fit::Outside(Some((i, range))) => {
                let got = match value {
                    Value::Pair(pair) => pair[i],
                    Value::Triple(three) => three[i],
                    Value::HalfPair(b) => b,
                    _ => f64::NAN,
                };
                Err(Error::refuse(ErrorKind::Value, place, format!("{}[{i}]", self.name), range, Value::Float(got)))
            }
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

    /// Whether all values are the same to the bit: 0 and −0 are equal, but give other updates.
    pub(crate) fn is_identical(&self, other: &Self) -> bool {
        self.values.len() == other.values.len() && self.values.iter().zip(&other.values).all(|(a, b)| a.is_identical(b))
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
        self.values[i] = self.declared[i].check(place, value)?;
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

    /// A whole number that the rule declares; `None` where it is left to the optimizer.
    pub(crate) fn whole(&self, name: &str) -> Option<i64> {
        match self.get(name) {
            Some(Value::Int(n)) => Some(n),
            _ => None,
        }
    }

    /// A choice that the rule declares; `None` where none is made.
    pub(crate) fn choice(&self, name: &str) -> Option<Choice> {
        match self.get(name) {
            Some(Value::Choice(choice)) => Some(choice),
            _ => None,
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
        let message = |r: Result<Value>| r.unwrap_err().to_string();
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
    fn choices_are_found_by_their_names() {
        for (choice, name) in Choice::ALL {
            assert_eq!((Choice::find(name), choice.name()), (Some(choice), name));
        }
        assert_eq!(Choice::find("Original"), None);
    }

    #[test]
    fn whole_floats_are_integers_as_far_as_they_stand_for_themselves() {
        let whole = Hyper { range: Range::OrNone(&Range::Whole(-5, i64::MAX)), ..LR };
        let exact = 2f64.powi(53);
        assert_eq!(whole.check("", Value::Float(exact)).unwrap(), Value::Int(1 << 53));
        assert_eq!(whole.check("", Value::Float(-5.0)).unwrap(), Value::Int(-5));
        assert_eq!(whole.check("", Value::None).unwrap(), Value::None);
        for refused in [exact + 2.0, 0.5, f64::INFINITY, f64::NAN] {
            assert_eq!(whole.check("", Value::Float(refused)).unwrap_err().kind(), ErrorKind::Type, "{refused}");
        }
        assert_eq!(LR.check("", Value::Int(3)).unwrap(), Value::Float(3.0));
    }

    #[test]
    fn identity_is_of_bits() {
        static DECLARED: [Hyper; 1] = [LR];
        let hypers = |value| Hypers { declared: &DECLARED, values: vec![value] };
        let values = [
            Value::None,
            Value::Bool(false),
            Value::Int(0),
            Value::Float(0.0),
            Value::Float(-0.0),
            Value::HalfPair(0.0),
            Value::HalfPair(-0.0),
            Value::Pair([0.0, 1.0]),
            Value::Pair([0.0, -0.0]),
            Value::Triple([0.0, 1.0, 2.0]),
            Value::Triple([0.0, 1.0, -2.0]),
            Value::Choice(Choice::Original),
        ];
        for (i, &a) in values.iter().enumerate() {
            for (k, &b) in values.iter().enumerate() {
                assert_eq!(hypers(a).is_identical(&hypers(b)), i == k, "{a:?} {b:?}");
            }
        }
        assert!(!Hypers { declared: &DECLARED, values: vec![] }.is_identical(&hypers(Value::None)));
    }

    #[test]
    fn a_refused_value_leaves_the_old_one() {
        static DECLARED: [Hyper; 1] = [LR];
        let mut hypers = Hypers::new(&DECLARED);
        assert_eq!(hypers.declared(), &DECLARED);
        hypers.set("Adam", "lr", Value::Float(0.5)).unwrap();
        assert!(hypers.set("Adam", "lr", Value::Float(f64::INFINITY)).is_err());
        assert!(hypers.set("Adam", "rate", Value::Float(0.1)).is_err());
        assert_eq!(hypers.get("lr"), Some(Value::Float(0.5)));
    }
}
