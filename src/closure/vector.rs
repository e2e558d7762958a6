//! Where the vectors of a method live, and what is done with them.

use std::borrow::Cow;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::isa::{Isa, Loops};
use crate::linear;
use crate::real::Real;

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
/// On the CPU it is an `Arc<[F]>`. Elsewhere operations may fail; a method does not see that. Their results
/// are NaN then, and [`Vector::outcome`] has the error.
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

impl<F: Real> Vector for Arc<[F]> {
    type Real = F;
    type Home = ();

    fn new((): &(), x: &[F]) -> Result<Self> {
        Ok(x.into())
    }

    fn to_host(&self) -> Result<Cow<'_, [F]>> {
        Ok(Cow::Borrowed(self))
    }

    fn outcome((): &()) -> Result<()> {
        Ok(())
    }

    fn len(&self) -> usize {
        <[F]>::len(self)
    }

    fn reduce<const N: usize>(wanted: [Reduction<'_, Self>; N]) -> [f64; N] {
        wanted.map(|one| match one {
            Reduction::Dot(a, b) => linear::dot(loops(), a, b),
            Reduction::SumAbs(x) => linear::sum_abs(loops(), x),
            Reduction::Largest(x, part) => linear::largest(loops(), &x[part]),
        })
    }

    fn set_to_sum(&mut self, x: &Self, a: f64, y: &Self) {
        if Arc::get_mut(self).is_none_or(|own| own.len() != x.len()) {
            *self = Arc::from(&**x);
        }
        linear::sum_scaled(loops(), Arc::make_mut(self), x, a, y);
    }

    fn add_scaled(&mut self, a: f64, x: &Self) {
        linear::axpy(loops(), Arc::make_mut(self), a, x);
    }

    fn scale(&mut self, a: f64) {
        let a = F::from_f64(a);
        match Arc::get_mut(self) {
            Some(x) => linear::each(loops(), x, [], |x, []| x * a),
            None => *self = self.iter().map(|&x| x * a).collect(),
        }
    }

    fn minus(&self, other: &Self) -> Self {
        self.iter().zip(&**other).map(|(&x, &y)| x - y).collect()
    }

    fn negative(&self) -> Self {
        self.iter().map(|&x| -x).collect()
    }
}
