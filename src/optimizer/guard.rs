//! What stands between the gradients and a step: bounds, and what happens where one is not finite.
//!
//! Everything here only reads. A step with a bound on the norm, or one that minds what is not finite, reads its
//! gradients once before it writes anything.

use super::Optimizer;
use crate::cpu::reduce::{Summands, clip_factor, first_nonfinite, nonfinite_in, norm_within};
use crate::error::{Error, ErrorKind, Result};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::hyper::{Hyper, Range, Value};
use crate::room;
use crate::store::Entry;
use crate::tensor::{RawTensor, TensorRef};

/// What a step does with gradients that are not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Nonfinite {
    /// Uses them.
    #[default]
    Propagate,
    /// Refuses and changes nothing.
    Raise,
    /// Leaves the update out and counts it.
    Skip,
}

/// What a scale of gradients may be.
const POWERS_OF_TWO: &str = "a power of two from 2^-126 to 2^126";

/// Bounds of the gradients, over all groups, before decay and `maximize`. First each element is brought into
/// `[-clip_value, clip_value]`, then all are scaled so that their 2-norm is at most `clip_norm`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Guard {
    /// Largest 2-norm of all gradients together.
    pub clip_norm: Option<f64>,
    /// Largest magnitude of an element.
    pub clip_value: Option<f64>,
    /// What happens where a gradient is not finite.
    pub nonfinite: Nonfinite,
}

const BOUND: Hyper = Hyper {
    name: "clip_norm",
    default: Value::None,
    range: Range::OrNone(&Range::AtLeastOrInfinite(0.0)),
    doc: "bound of the gradients",
};

impl Guard {
    /// As the device takes them, of gradients that were multiplied by a power of two.
    #[cfg(feature = "gpu")]
    pub(super) fn bounds(&self, grad_scale: f64) -> gpu::Bounds {
        gpu::Bounds {
            bound: self.clip_value.unwrap_or(f64::INFINITY) * grad_scale,
            scale_exponent: libm::ilogb(grad_scale),
            max_norm: self.clip_norm,
            skips: self.nonfinite != Nonfinite::Propagate,
        }
    }

    /// Refuses bounds that are none.
    pub(super) fn check(&self, place: &str) -> Result<()> {
        for (name, bound) in [("clip_norm", self.clip_norm), ("clip_value", self.clip_value)] {
            Hyper { name, ..BOUND }.check(place, bound.map_or(Value::None, Value::Float))?;
        }
        Ok(())
    }
}

/// What becomes of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Verdict {
    /// It goes on with gradients multiplied by this.
    Go(f64),
    /// It is left out.
    Skip,
}

/// What the first number that is not finite is, and where.
pub(super) fn found_in(gradient: &TensorRef<'_>, is_complex: bool) -> String {
    // Another thread may have written over it since it was seen.
    let Some((i, value)) = nonfinite_in(gradient) else { return "a number that is not".into() };
    let mut place = i;
    if let Some(rows) = &gradient.rows {
        rows.walk(i, 1, |_, at| place = at);
    }
    let part = ["real", "imaginary"][place % 2];
    match is_complex {
        true => format!("{value:?} in the {part} part at flat index {}", place / 2),
        false => format!("{value:?} at flat index {place}"),
    }
}

/// The gradients that there are, for a norm.
struct Present<'a> {
    entries: &'a [Entry],
    gradients: &'a [Option<TensorRef<'a>>],
    /// Which.
    indices: &'a [usize],
}

impl Summands for Present<'_> {
    fn count(&self) -> usize {
        self.indices.len()
    }

    fn get(&self, i: usize) -> (&RawTensor, bool) {
        let index = self.indices[i];
        let Some(gradient) = &self.gradients[index] else { unreachable!("it is one of those that there are") };
        (&gradient.raw, self.entries[index].info.dtype.is_complex())
    }
}

impl Optimizer {
    /// What the coming gradients were multiplied by; 1 unless it was set.
    pub fn grad_scale(&self) -> f64 {
        self.grad_scale
    }

    /// Says what the coming gradients were multiplied by, a power of two: steps divide it out before anything else.
    /// Loss scaling does this so that small float16 gradients do not vanish.
    pub fn set_grad_scale(&mut self, scale: f64) -> Result<()> {
        if self.preset().needs_closure() {
            return Err(Error::refuse(ErrorKind::Value, self.preset().name, "grad_scale", "1", scale)
                .with_remedy("a line search needs the gradients of the loss it is told"));
        }
        let is_power = scale.is_normal() && scale > 0.0 && libm::ldexp(1.0, libm::ilogb(scale)) == scale;
        if !is_power || libm::ilogb(scale).abs() > 126 {
            return Err(Error::refuse(ErrorKind::Value, self.preset().name, "grad_scale", POWERS_OF_TWO, scale));
        }
        self.grad_scale = scale;
        Ok(())
    }

    /// The error of a gradient that is not finite.
    pub(super) fn nonfinite(&self, index: usize, got: &str) -> Error {
        let name = format!("gradient of {}", self.entries[index].label(index));
        Error::refuse(ErrorKind::Nonfinite, self.place_of("step"), name, "finite", got)
            .with_remedy("nonfinite=\"skip\" leaves such updates out")
    }

    /// Reads the gradients as far as the guard asks for it. On a GPU the device does, within the step.
    pub(super) fn judge(&mut self, gradients: &[Option<TensorRef<'_>>]) -> Result<Verdict> {
        #[cfg(feature = "gpu")]
        if let super::Backend::Gpu(_) = self.backend {
            return Ok(Verdict::Go(1.0));
        }
        let Guard { clip_norm, clip_value, nonfinite } = self.guard;
        if clip_norm.is_none() && nonfinite == Nonfinite::Propagate {
            return Ok(Verdict::Go(1.0));
        }
        let Self { entries, scratch, threads, .. } = self;
        let (indices, joined) = (&mut scratch.present, &mut scratch.joined);
        indices.clear();
        room::reserve(indices, gradients.len(), "the numbers of gradients")?;
        indices.extend((0..gradients.len()).filter(|&i| gradients[i].is_some()));
        let present = Present { entries, gradients, indices };
        let bound = clip_value.unwrap_or(f64::INFINITY) * self.grad_scale;
        let norm = match clip_norm {
            Some(_) => Some(norm_within(&present, bound, threads, joined)? / self.grad_scale),
            None => None,
        };
        // A finite norm of unbounded values says that all are finite.
        let known_finite = clip_value.is_none() && norm.is_some_and(f64::is_finite);
        let culprit = if nonfinite == Nonfinite::Propagate || known_finite {
            None
        } else {
            first_nonfinite(&present, threads, joined)?.map(|which| indices[which])
        };
        self.gradient_norm = norm;
        if let Some(index) = culprit {
            if nonfinite == Nonfinite::Skip {
                return Ok(Verdict::Skip);
            }
            let Some(gradient) = &gradients[index] else { unreachable!("it has such a number") };
            let found = found_in(gradient, self.entries[index].info.dtype.is_complex());
            return Err(self.nonfinite(index, &found));
        }
        Ok(Verdict::Go(match (clip_norm, norm) {
            (Some(max_norm), Some(norm)) => clip_factor(max_norm, norm),
            _ => 1.0,
        }))
    }
}
