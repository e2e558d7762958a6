//! Gradients of several batches, added up for one update.
//!
//! Sums are in the type that state is kept in, on the device that steps: what was added there never crosses the bus.

use super::{Backend, Besides, Optimizer, refuse_sparse};
#[cfg(feature = "gpu")]
use super::{COPY_IN_PARALLEL, noted};
use crate::cpu::StandardFloats;
use crate::cpu::memory::{add, gather};
use crate::drill::point;
use crate::error::{Error, ErrorKind, Result};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::real::{Dtype, Real};
use crate::room;
use crate::tensor::{TensorMut, TensorRef};

/// A sum on the host.
#[derive(Debug)]
pub(super) enum Sum {
    Single(Vec<f32>),
    Double(Vec<f64>),
}

impl Sum {
    /// A copy.
    fn of(gradient: &TensorRef<'_>) -> Result<Self> {
        fn copied<F: Real>(gradient: &TensorRef<'_>) -> Result<Vec<F>> {
            let mut copy = room::filled(gradient.len(), F::ZERO, "a sum of gradients")?;
            gather(gradient, &mut copy);
            Ok(copy)
        }
        Ok(match gradient.raw.dtype {
            Dtype::F64 => Self::Double(copied(gradient)?),
            _ => Self::Single(copied(gradient)?),
        })
    }

    fn add(&mut self, gradient: &TensorRef<'_>) {
        match self {
            Self::Single(sum) => add(gradient, sum),
            Self::Double(sum) => add(gradient, sum),
        }
    }

    fn as_gradient(&self) -> TensorRef<'_> {
        match self {
            Self::Single(sum) => sum.as_slice().into(),
            Self::Double(sum) => sum.as_slice().into(),
        }
    }
}

impl Optimizer {
    /// Adds gradients to the sums that [`Optimizer::step_accumulated`] takes. They are in order of registration;
    /// `None` adds nothing. On an error nothing has changed.
    pub fn accumulate(&mut self, gradients: &[Option<TensorRef<'_>>]) -> Result<()> {
        let _arithmetic = StandardFloats::begin();
        let place = self.place_of("accumulate");
        if self.preset.needs_closure() {
            let name = self.preset.name;
            return Err(Error::refuse(ErrorKind::Type, place, "the optimizer", "one that takes gradients", name));
        }
        // What became of the step before is told first: nothing has been added then.
        self.settle()?;
        self.check_whole("accumulate")?;
        if gradients.len() != self.entries.len() {
            let (want, got) = (format!("{} arrays", self.entries.len()), gradients.len());
            return Err(Error::refuse(ErrorKind::Value, place, "gradients", want, got));
        }
        for (i, gradient) in gradients.iter().enumerate() {
            if let Some(gradient) = gradient {
                refuse_sparse(place, "dense", &self.entries[i], i, gradient)?;
                self.check_gradient(place, i, gradient)?;
            }
        }
        match &mut self.backend {
            Backend::Cpu(_) => {
                self.sums.resize_with(gradients.len(), || None);
                // What needs memory comes first: nothing has been added where there is none.
                let pairs = self.sums.iter().zip(gradients);
                let begun = pairs.map(|(sum, gradient)| match (sum, gradient) {
                    (None, Some(gradient)) => Sum::of(gradient).map(Some),
                    _ => Ok(None),
                });
                let begun = begun.collect::<Result<Vec<_>>>()?;
                self.torn = true;
                for ((sum, gradient), begun) in self.sums.iter_mut().zip(gradients).zip(begun) {
                    point();
                    match (&mut *sum, gradient) {
                        (Some(sum), Some(gradient)) => sum.add(gradient),
                        _ => *sum = begun.or(sum.take()),
                    }
                }
                self.torn = false;
                Ok(())
            }
            #[cfg(feature = "gpu")]
            Backend::GpuVectors(_) => unreachable!("refused above"),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => {
                let elements: usize = gradients.iter().flatten().map(TensorRef::len).sum();
                let pool = self.threads.pool(elements >= COPY_IN_PARALLEL);
                self.torn = true;
                let added = executor.accumulate(gradients, pool);
                self.torn = false;
                noted(added, &mut self.torn)
            }
        }
    }

    /// One update by the sums of gradients, which begin anew then, also where a sum is not finite. After another
    /// error they are kept.
    pub fn step_accumulated(&mut self, params: &mut [TensorMut<'_>], besides: Besides<'_, '_>) -> Result<()> {
        let sums = std::mem::take(&mut self.sums);
        let gradients: Vec<Option<TensorRef<'_>>> = match &self.backend {
            Backend::Cpu(_) => {
                let sum_of = |i: usize| sums.get(i)?.as_ref().map(Sum::as_gradient);
                (0..self.entries.len()).map(sum_of).collect()
            }
            #[cfg(feature = "gpu")]
            Backend::GpuVectors(_) => Vec::new(),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => {
                let entries = self.entries.iter().enumerate();
                entries.map(|(i, entry)| executor.has_sum(i).then(|| gpu::sum_of(entry.info.reals()))).collect()
            }
        };
        let stepped = self.step_with(params, &gradients, besides);
        drop(gradients);
        if matches!(&stepped, Err(error) if error.kind() != ErrorKind::Nonfinite) {
            self.sums = sums;
        }
        stepped
    }

    /// Whether gradients were added up for the next step.
    pub fn has_sums(&self) -> bool {
        match &self.backend {
            Backend::Cpu(_) => self.sums.iter().any(Option::is_some),
            #[cfg(feature = "gpu")]
            Backend::GpuVectors(_) => false,
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => (0..self.entries.len()).any(|index| executor.has_sum(index)),
        }
    }

    /// Forgets sums of gradients.
    pub fn clear_sums(&mut self) {
        self.sums.clear();
        #[cfg(feature = "gpu")]
        if let Backend::Gpu(executor) = &mut self.backend {
            executor.clear_sums();
        }
    }
}
