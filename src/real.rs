//! The compute types of the rules, f32 and f64, and the storage types of arrays.
//!
//! A rule computes in `F: Real`. What lies in memory is an [`Element`] of `F`: the same type today, a
//! narrower one where an array stores fewer bits than the rule computes in.

use std::fmt::{self, Debug};
use std::ops::{Add, Div, Mul, Neg, Sub};

/// What an array stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    BF16,
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary64.
    F64,
    /// Two binary32, real and imaginary part.
    C64,
    /// Two binary64, real and imaginary part.
    C128,
}

impl Dtype {
    /// Every dtype.
    pub const ALL: [Self; 6] = [Self::F16, Self::BF16, Self::F32, Self::F64, Self::C64, Self::C128];

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
            Self::F64 | Self::C64 => 8,
            Self::C128 => 16,
        }
    }

    /// NumPy's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::C64 => "complex64",
            Self::C128 => "complex128",
        }
    }

    /// Whether elements are complex.
    pub const fn is_complex(self) -> bool {
        matches!(self, Self::C64 | Self::C128)
    }

    /// What one of the real numbers of an element is: complex numbers are updated as pairs of reals.
    pub const fn part(self) -> Self {
        match self {
            Self::C64 => Self::F32,
            Self::C128 => Self::F64,
            other => other,
        }
    }

    /// Real numbers of an element.
    pub const fn parts(self) -> usize {
        if self.is_complex() { 2 } else { 1 }
    }

    /// What the state of a parameter of this dtype stores: half precision is kept in single.
    pub const fn of_state(self) -> Self {
        match self {
            Self::F16 | Self::BF16 => Self::F32,
            other => other,
        }
    }

    /// The largest number.
    pub fn largest(self) -> f64 {
        match self.part() {
            Self::F16 => half::f16::MAX.to_f64(),
            Self::BF16 => half::bf16::MAX.to_f64(),
            Self::F64 => f64::MAX,
            _ => f32::MAX.into(),
        }
    }

    /// Distance from 1 to the next number.
    pub const fn epsilon(self) -> f64 {
        match self {
            Self::F16 => 0.000_976_562_5,
            Self::BF16 => 0.007_812_5,
            Self::F32 | Self::C64 => f32::EPSILON as f64,
            Self::F64 | Self::C128 => f64::EPSILON,
        }
    }

    /// Whether a gradient of dtype `gradient` may be given to a parameter of this dtype: its own, or single
    /// precision for half.
    pub fn takes(self, gradient: Self) -> bool {
        gradient == self || gradient == self.of_state()
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
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
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
    /// The dtype of arrays of this type.
    const STORED: Dtype;
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
            const STORED: Dtype = $dtype;
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

macro_rules! half {
    ($type:ty, $dtype:expr) => {
        impl Element<f32> for $type {
            const STORED: Dtype = $dtype;
            const IS_COMPUTE_TYPE: bool = false;

            #[inline(always)]
            fn widen(self) -> f32 {
                self.to_f32()
            }

            #[inline(always)]
            fn narrow(x: f32) -> Self {
                Self::from_f32(x)
            }
        }
    };
}

half!(half::f16, Dtype::F16);
half!(half::bf16, Dtype::BF16);

/// Does something with the storage types of a parameter and its gradient and their compute type.
pub trait StorageVisitor {
    /// What it returns.
    type Out;
    /// Called with the types.
    fn visit<P: Element<F>, G: Element<F>, F: Real>(self) -> Self::Out;
}

/// Hands the types of a parameter's and a gradient's real numbers to the visitor. The gradient's must be one
/// that [`Dtype::takes`] allows.
pub fn with_storage<V: StorageVisitor>(parameter: Dtype, gradient: Dtype, visitor: V) -> V::Out {
    use half::{bf16, f16};
    match (parameter.part(), gradient.part()) {
        (Dtype::F16, Dtype::F16) => visitor.visit::<f16, f16, f32>(),
        (Dtype::F16, _) => visitor.visit::<f16, f32, f32>(),
        (Dtype::BF16, Dtype::BF16) => visitor.visit::<bf16, bf16, f32>(),
        (Dtype::BF16, _) => visitor.visit::<bf16, f32, f32>(),
        (Dtype::F64, _) => visitor.visit::<f64, f64, f64>(),
        _ => visitor.visit::<f32, f32, f32>(),
    }
}

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
