//! Where the vectors of a method live, and what is done with them.

use std::borrow::Cow;
use std::fmt::Debug;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::isa::{Isa, Loops};
use crate::linear;
use crate::real::Real;
use crate::room;

/// A number that is made of all elements of vectors.
#[derive(Debug, Clone)]
pub enum Reduction<'a, V> {
    /// a·b, over as many elements as both have.
    Dot(&'a V, &'a V),
    /// Σ|xᵢ|.
    SumAbs(&'a V),
    /// max|xᵢ| of a part, NaN where an element is NaN, 0 without elements.
    Largest(&'a V, Range<usize>),
}

/// One number for each element of the point. A clone shares its memory until one of both is written.
///
/// Operations may fail for want of memory or of a device; a method does not see that. Numbers are NaN then, and
/// [`Vector::outcome`] has the error.
pub trait Vector: Clone + Debug + Default + Send + Sync {
    /// Type of the elements.
    type Real: Real;
    /// Where vectors are made.
    type Home: Clone + Debug + Send;

    /// With these elements.
    fn new(home: &Self::Home, x: &[Self::Real]) -> Result<Self>;

    /// The elements.
    fn to_host(&self) -> Result<Cow<'_, [Self::Real]>>;

    /// The first error of operations since the last call.
    fn outcome(home: &Self::Home) -> Result<()>;

    /// Number of elements.
    fn len(&self) -> usize;

    /// Several numbers at once. They are sums of products in f64, of a fixed shape.
    fn reduce<const N: usize>(wanted: [Reduction<'_, Self>; N]) -> [f64; N];

    /// self ← x + a·y.
    fn set_to_sum(&mut self, x: &Self, a: f64, y: &Self);

    /// self ← self + a·x.
    fn add_scaled(&mut self, a: f64, x: &Self);

    /// self ← a·self.
    fn scale(&mut self, a: f64);

    /// self − other.
    fn minus(&self, other: &Self) -> Self;

    /// −self.
    fn negative(&self) -> Self;

    /// Whether it has no elements.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What [`Vector::largest`] asks for, to be reduced along with others.
    fn whole(&self) -> Reduction<'_, Self> {
        Reduction::Largest(self, 0..self.len())
    }

    /// self·other.
    fn dot(&self, other: &Self) -> f64 {
        let [dot] = Self::reduce([Reduction::Dot(self, other)]);
        dot
    }

    /// Σ|xᵢ|.
    fn sum_abs(&self) -> f64 {
        let [sum] = Self::reduce([Reduction::SumAbs(self)]);
        sum
    }

    /// max|xᵢ|, NaN where an element is NaN, 0 without elements.
    fn largest(&self) -> f64 {
        self.largest_of(0..self.len())
    }

    /// [`Vector::largest`] of a part.
    fn largest_of(&self, part: Range<usize>) -> f64 {
        let [largest] = Self::reduce([Reduction::Largest(self, part)]);
        largest
    }
}

/// Work is spread over threads where a caller entered its pool, which it does where it is worth it.
fn loops() -> Loops {
    Loops { isa: Isa::detect(), parallel: rayon::current_thread_index().is_some() }
}

/// Where vectors of the CPU are made: it remembers whether there was no memory for one.
#[derive(Debug, Clone, Default)]
pub struct HostHome(Arc<AtomicBool>);

impl HostHome {
    fn is_full(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A vector in the memory of the CPU. Where there is none for the result of an operation, the result is empty; until
/// [`Vector::outcome`] tells of it, all numbers that are made of vectors from the same home are NaN and operations do
/// nothing.
#[derive(Debug, Clone)]
pub struct HostVector<F> {
    elements: Arc<Vec<F>>,
    home: HostHome,
}

impl<F> Default for HostVector<F> {
    fn default() -> Self {
        Vec::new().into()
    }
}

impl<F> Deref for HostVector<F> {
    type Target = [F];

    fn deref(&self) -> &[F] {
        &self.elements
    }
}

impl<F: PartialEq> PartialEq for HostVector<F> {
    fn eq(&self, other: &Self) -> bool {
        self.elements == other.elements
    }
}

impl<F> From<Vec<F>> for HostVector<F> {
    fn from(elements: Vec<F>) -> Self {
        Self { elements: Arc::new(elements), home: HostHome::default() }
    }
}

impl<F: Clone> From<&[F]> for HostVector<F> {
    fn from(elements: &[F]) -> Self {
        elements.to_vec().into()
    }
}

impl<F, const N: usize> From<[F; N]> for HostVector<F> {
    fn from(elements: [F; N]) -> Self {
        Vec::from(elements).into()
    }
}

impl<F> FromIterator<F> for HostVector<F> {
    fn from_iter<I: IntoIterator<Item = F>>(elements: I) -> Self {
        elements.into_iter().collect::<Vec<F>>().into()
    }
}

/// What messages call them.
const WHAT: &str = "a vector of an optimizer";

impl<F: Real> HostVector<F> {
    /// What a computation on vectors of this home makes.
    fn made(home: &HostHome, elements: impl ExactSizeIterator<Item = F>) -> Self {
        let made = if home.is_full() { None } else { room::listed(elements, WHAT).ok() };
        if made.is_none() {
            home.0.store(true, Ordering::Relaxed);
        }
        Self { elements: Arc::new(made.unwrap_or_default()), home: home.clone() }
    }

    /// Its elements, which nobody shares any more; none where there is no memory for a copy of those that somebody does.
    fn own(&mut self) -> &mut [F] {
        if Arc::get_mut(&mut self.elements).is_none() {
            *self = Self::made(&self.home, self.iter().copied());
        }
        match Arc::get_mut(&mut self.elements) {
            Some(elements) if !self.home.is_full() => elements,
            _ => &mut [],
        }
    }
}

impl<F: Real> Vector for HostVector<F> {
    type Real = F;
    type Home = HostHome;

    fn new(home: &HostHome, x: &[F]) -> Result<Self> {
        Ok(Self { elements: Arc::new(room::copied(x, WHAT)?), home: home.clone() })
    }

    fn to_host(&self) -> Result<Cow<'_, [F]>> {
        Ok(Cow::Borrowed(self))
    }

    fn outcome(home: &HostHome) -> Result<()> {
        if home.0.swap(false, Ordering::Relaxed) {
            let sentence = format!("roptim: memory for {WHAT} could not be allocated");
            return Err(Error::plain(ErrorKind::OutOfMemory, sentence));
        }
        Ok(())
    }

    fn len(&self) -> usize {
        self.elements.len()
    }

    fn reduce<const N: usize>(wanted: [Reduction<'_, Self>; N]) -> [f64; N] {
        wanted.map(|one| match one {
            Reduction::Dot(x, _) | Reduction::SumAbs(x) | Reduction::Largest(x, _) if x.home.is_full() => f64::NAN,
            Reduction::Dot(a, b) => linear::dot(loops(), a, b),
            Reduction::SumAbs(x) => linear::sum_abs(loops(), x),
            Reduction::Largest(x, part) => linear::largest(loops(), &x[part]),
        })
    }

    fn set_to_sum(&mut self, x: &Self, a: f64, y: &Self) {
        let fits = |own: &mut Vec<F>| own.len() == x.len();
        if !Arc::get_mut(&mut self.elements).is_some_and(fits) {
            *self = Self::made(&x.home, x.iter().copied());
        }
        let own = self.own();
        if own.len() == x.len() {
            linear::sum_scaled(loops(), own, x, a, y);
        }
    }

    fn add_scaled(&mut self, a: f64, x: &Self) {
        let own = self.own();
        if own.len() == x.len() {
            linear::axpy(loops(), own, a, x);
        }
    }

    fn scale(&mut self, a: f64) {
        let a = F::from_f64(a);
        match Arc::get_mut(&mut self.elements) {
            Some(x) => linear::each(loops(), x, [], |x, []| x * a),
            None => *self = Self::made(&self.home, self.iter().map(|&x| x * a)),
        }
    }

    fn minus(&self, other: &Self) -> Self {
        Self::made(&self.home, self.iter().zip(&**other).map(|(&x, &y)| x - y))
    }

    fn negative(&self) -> Self {
        Self::made(&self.home, self.iter().map(|&x| -x))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_memory_numbers_are_nan_until_it_is_told() {
        let home = HostHome::default();
        let x = HostVector::new(&home, &[1.0f64, 2.0]).unwrap();
        home.0.store(true, Ordering::Relaxed);
        let (mut sum, mut shared) = (HostVector::default(), x.clone());
        sum.set_to_sum(&x, 2.0, &x);
        shared.add_scaled(1.0, &x);
        assert!(sum.is_empty() && x.minus(&x).is_empty() && x.negative().is_empty());
        assert!(
            x.dot(&x).is_nan() && sum.largest().is_nan() && x.largest_of(0..1).is_nan() && shared.sum_abs().is_nan()
        );
        shared.scale(2.0);
        let error = HostVector::<f64>::outcome(&home).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfMemory);
        HostVector::<f64>::outcome(&home).unwrap();
        assert_eq!((&x[..], x.dot(&x)), (&[1.0, 2.0][..], 5.0));
    }
}
