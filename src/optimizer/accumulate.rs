//! Gradients of several batches, added up for one update.
//!
//! Sums are in the type that state is kept in, on the device that steps: what was added there never crosses the bus.

use super::{Backend, Besides, Optimizer, refuse_sparse};
#[cfg(feature = "gpu")]
use super::{COPY_IN_PARALLEL, noted};
use crate::cpu::StandardFloats;
use crate::cpu::memory::gather;
use crate::drill::point;
use crate::error::{Error, ErrorKind, Result};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::real::{Dtype, Real};
use crate::tensor::{TensorMut, TensorRef};

/// A sum on the host.
#[derive(Debug)]
pub(super) enum Sum {
    Single(Vec<f32>),
    Double(Vec<f64>),
}

fn add<F: Real>(sum: &mut [F], gradient: &TensorRef<'_>, scratch: &mut Vec<F>) {
    scratch.clear();
    scratch.resize(sum.len(), F::ZERO);
    gather(gradient, scratch);
    sum.iter_mut().zip(scratch).for_each(|(sum, x)| *sum = *sum + *x);
}

impl Sum {
    fn of(gradient: &TensorRef<'_>) -> Self {
        fn copied<F: Real>(gradient: &TensorRef<'_>) -> Vec<F> {
            let mut copy = vec![F::ZERO; gradient.len()];
            gather(gradient, &mut copy);
            copy
        }
        match gradient.raw.dtype {
            Dtype::F64 => Self::Double(copied(gradient)),
            _ => Self::Single(copied(gradient)),
        }
    }

    fn add(&mut self, gradient: &TensorRef<'_>, single: &mut Vec<f32>, double: &mut Vec<f64>) {
        match self {
            Self::Single(sum) => add(sum, gradient, single),
            Self::Double(sum) => add(sum, gradient, double),
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
                refuse_sparse(&place, "dense", &self.entries[i], i, gradient)?;
                self.check_gradient(&place, i, gradient)?;
            }
        }
        match &mut self.backend {
            Backend::Cpu(_) => {
                self.torn = true;
                self.sums.resize_with(gradients.len(), || None);
                let (mut single, mut double) = (Vec::new(), Vec::new());
                for (sum, gradient) in self.sums.iter_mut().zip(gradients) {
                    point();
                    match (sum, gradient) {
                        (Some(sum), Some(gradient)) => sum.add(gradient, &mut single, &mut double),
                        (sum @ None, Some(gradient)) => *sum = Some(Sum::of(gradient)),
                        (_, None) => {}
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
