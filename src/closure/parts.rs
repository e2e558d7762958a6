//! A method's state as named values, and back after checks.

use std::collections::BTreeMap;

use super::vector::Vector;
use crate::error::{Error, ErrorKind, Result};

/// One value.
#[derive(Debug, Clone, PartialEq)]
pub enum Part<V> {
    /// A place in a list that nothing has come to.
    None,
    /// A count.
    Count(u64),
    /// A number.
    Number(f64),
    /// One number for each element of the point.
    Vector(V),
    /// Several of these.
    List(Vec<Part<V>>),
}

impl<V> Part<V> {
    fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Count(_) | Self::Number(_) => "a number",
            Self::Vector(_) => "an array",
            Self::List(_) => "a list",
        }
    }
}

/// Values by name, taken out one after another.
#[derive(Debug)]
pub struct Parts<V> {
    place: String,
    /// Elements of a vector.
    n: usize,
    values: BTreeMap<String, Part<V>>,
    /// Names that were asked for.
    known: Vec<&'static str>,
}

impl<V: Vector> Parts<V> {
    /// The state of a point of `n` elements; `place` starts messages.
    pub fn new(place: &str, n: usize, values: BTreeMap<String, Part<V>>) -> Self {
        Self { place: place.to_owned(), n, values, known: Vec::new() }
    }

    fn refuse(
        &self,
        kind: ErrorKind,
        name: &str,
        allowed: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Error {
        Error::refuse(kind, &self.place, name, allowed, got)
    }

    fn wrong<T>(&self, name: &str, allowed: &str, got: &Part<V>) -> Result<T> {
        Err(self.refuse(ErrorKind::Type, name, allowed, got.kind()))
    }

    /// Whether there is such a value.
    pub fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    fn take(&mut self, name: &'static str) -> Result<Part<V>> {
        self.known.push(name);
        self.values.remove(name).ok_or_else(|| self.refuse(ErrorKind::Value, name, "present", "none"))
    }

    /// A count.
    pub fn count(&mut self, name: &'static str) -> Result<u64> {
        match self.take(name)? {
            Part::Count(n) => Ok(n),
            Part::Number(x) if x >= 0.0 && x.fract() == 0.0 && x < 9_007_199_254_740_992.0 => Ok(x as u64),
            Part::Number(x) => Err(self.refuse(ErrorKind::Value, name, "a whole number >= 0", x)),
            other => self.wrong(name, "a whole number", &other),
        }
    }

    /// A finite number.
    pub fn number(&mut self, name: &'static str) -> Result<f64> {
        let part = self.take(name)?;
        self.as_number(name, &part)
    }

    fn as_number(&self, name: &str, part: &Part<V>) -> Result<f64> {
        match part {
            Part::Count(n) => Ok(*n as f64),
            Part::Number(x) if x.is_finite() => Ok(*x),
            Part::Number(x) => Err(self.refuse(ErrorKind::Value, name, "a finite number", x)),
            other => self.wrong(name, "a number", other),
        }
    }

    /// A vector of the point's length.
    pub fn vector(&mut self, name: &'static str) -> Result<V> {
        let part = self.take(name)?;
        self.as_vector(name, part)
    }

    fn as_vector(&self, name: &str, part: Part<V>) -> Result<V> {
        match part {
            Part::Vector(x) if x.len() == self.n => Ok(x),
            Part::Vector(x) => {
                let (want, got) = (format!("of {} elements", self.n), x.len());
                Err(self.refuse(ErrorKind::Value, name, want, got))
            }
            other => self.wrong(name, "an array", &other),
        }
    }

    fn list(&mut self, name: &'static str) -> Result<Vec<Part<V>>> {
        match self.take(name)? {
            Part::List(items) => Ok(items),
            other => self.wrong(name, "a list", &other),
        }
    }

    /// Vectors of the point's length.
    pub fn vectors(&mut self, name: &'static str) -> Result<Vec<V>> {
        let items = self.list(name)?.into_iter().enumerate();
        items.map(|(i, item)| self.as_vector(&format!("{name}[{i}]"), item)).collect()
    }

    /// Finite numbers, as many as there are before the first None; none without the list.
    pub fn numbers(&mut self, name: &'static str) -> Result<Vec<f64>> {
        if !self.has(name) {
            self.known.push(name);
            return Ok(Vec::new());
        }
        let items = self.list(name)?;
        let items = items.iter().take_while(|item| !matches!(item, Part::None)).enumerate();
        items.map(|(i, item)| self.as_number(&format!("{name}[{i}]"), item)).collect()
    }

    /// That as many values were taken from one list as from another.
    pub fn same_length(&self, [a, b]: [(&str, usize); 2]) -> Result<()> {
        if a.1 == b.1 {
            return Ok(());
        }
        Err(self.refuse(ErrorKind::Value, a.0, format!("as long as {} ({})", b.0, b.1), format!("length {}", a.1)))
    }

    /// Refuses what nobody asked for.
    pub fn finish(self) -> Result<()> {
        match self.values.keys().next() {
            None => Ok(()),
            Some(key) => {
                let allowed = format!("one of {}", self.known.join(", "));
                Err(self.refuse(ErrorKind::Value, "state key", allowed, key))
            }
        }
    }
}
