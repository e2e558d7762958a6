//! The compute types of the rules, f32 and f64, and the storage types of arrays.
//!
//! A rule computes in `F: Real`. What lies in memory is an [`Element`] of `F`: the same type today, a
//! narrower one where an array stores fewer bits than the rule computes in.

use std::fmt::{self, Debug};
use std::ops::{Add, Div, Mul, Neg, Sub};

/// What an array stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary64.
    F64,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// NumPy's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F64 => "float64",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

mod sealed {
    /// Keeps other crates from implementing the traits: memory is read by what they say of themselves.
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// A compute type. Each operation rounds once; nothing is fused and nothing is reassociated.
pub trait Real:
    sealed::Sealed
    + Copy
    + Debug
    + PartialEq
    + PartialOrd
    + Send
    + Sync
    + 'static
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + Element<Self>
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// 1/2.
    const HALF: Self;
    /// The smallest positive normal number.
    const MIN_POSITIVE: Self;
    /// The dtype of arrays of this type.
    const DTYPE: Dtype;

    /// One rounding of a host scalar.
    fn from_f64(x: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// Correctly rounded square root.
    fn sqrt(self) -> Self;
    /// Magnitude.
    fn abs(self) -> Self;
    /// Not a number.
    fn is_nan(self) -> bool;

    /// The larger of two numbers; NaN where either is NaN, which `f32::max` is not.
    #[inline(always)]
    fn max_nan(self, other: Self) -> Self {
        let larger = if self > other { self } else { other };
        if self.is_nan() { self } else { larger }
    }

    /// `a + w·(b − a)`, or from the other end where `|w| ≥ 1/2`, so that `w = 1` gives `b` exactly.
    #[inline(always)]
    fn lerp(a: Self, b: Self, w: Self) -> Self {
        let delta = b - a;
        let near_a = a + w * delta;
        let near_b = b + (w - Self::ONE) * delta;
        if w.abs() < Self::HALF { near_a } else { near_b }
    }
}

/// A storage type of the compute type `F`.
pub trait Element<F>: sealed::Sealed + Copy + Send + Sync + 'static {
    /// Whether it is the compute type itself, so that arrays need no conversion.
    const IS_COMPUTE_TYPE: bool;
    /// Exact.
    fn widen(self) -> F;
    /// One rounding to nearest, ties to even.
    fn narrow(x: F) -> Self;
}

macro_rules! real {
    ($type:ty, $dtype:expr) => {
        impl Real for $type {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const HALF: Self = 0.5;
            const MIN_POSITIVE: Self = <$type>::MIN_POSITIVE;
            const DTYPE: Dtype = $dtype;

            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $type
            }

            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }

            #[inline(always)]
            fn sqrt(self) -> Self {
                <$type>::sqrt(self)
            }

            #[inline(always)]
            fn abs(self) -> Self {
                <$type>::abs(self)
            }

            #[inline(always)]
            fn is_nan(self) -> bool {
                <$type>::is_nan(self)
            }
        }

        impl Element<$type> for $type {
            const IS_COMPUTE_TYPE: bool = true;

            #[inline(always)]
            fn widen(self) -> $type {
                self
            }

            #[inline(always)]
            fn narrow(x: $type) -> Self {
                x
            }
        }
    };
}

real!(f32, Dtype::F32);
real!(f64, Dtype::F64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn max_propagates_nan_from_either_side() {
        assert!(f32::NAN.max_nan(1.0).is_nan());
        assert!(1.0f32.max_nan(f32::NAN).is_nan());
        assert_eq!(1.0f64.max_nan(2.0), 2.0);
        assert_eq!(f64::INFINITY.max_nan(2.0), f64::INFINITY);
    }

    #[test]
    fn lerp_with_weight_one_is_exactly_the_end() {
        assert_eq!(f32::lerp(1.0e8, 3.3, 1.0), 3.3);
        assert_eq!(f32::lerp(1.0, 2.0, 0.0), 1.0);
    }
}
