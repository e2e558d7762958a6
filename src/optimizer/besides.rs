//! What a step does besides the update: an average of the parameters is brought up to date, sums of squares are taken.
//!
//! Elementwise rules do both on the CPU in the pass of the update, piece by piece while the numbers are in the cache;
//! the bits are those of a pass of its own. Others do it before and after.

use super::{Backend, Optimizer};
use crate::cpu::{Before, Squares};
use crate::error::{Error, ErrorKind, Result};
use crate::rules::{Method, RuleId};
use crate::tensor::{TensorMut, TensorRef};

/// What a step does besides the update.
#[derive(Debug, Default)]
pub struct Besides<'s, 'a> {
    /// The helper `AveragedModel` on the CPU, and its averages: as if it took a step after this one, whatever became of
    /// it, with the parameters for gradients.
    pub average: Option<(&'s mut Optimizer, &'s mut [TensorMut<'a>])>,
    /// Whether [`Optimizer::squares`] are wanted.
    pub measures: bool,
}

impl Optimizer {
    /// Sums of squares of the last step, by parameter, where they were asked for: those without a gradient have none,
    /// and after an update that was left out nobody has.
    pub fn squares(&self) -> &[Option<Squares>] {
        &self.squares
    }

    /// Whether what a step does besides fits to it.
    pub(super) fn check_besides(&self, params: &[TensorMut<'_>], besides: &Besides<'_, '_>) -> Result<()> {
        let on_cpu = |optimizer: &Self| matches!(optimizer.backend, Backend::Cpu(_));
        let refuse = |name: &str| {
            let remedy = "compute it after the step";
            Err(Error::refuse(ErrorKind::Value, self.place_of("step"), name, "of steps on the CPU", "one on a GPU")
                .with_remedy(remedy))
        };
        if besides.measures && !on_cpu(self) {
            return refuse("statistics");
        }
        let Some((average, averages)) = &besides.average else { return Ok(()) };
        if !on_cpu(self) || !on_cpu(average) {
            return refuse("average");
        }
        average.check(averages, &readings(params, |_| true))
    }

    /// Whether the average can follow the update piece by piece.
    pub(super) fn can_follow(&self, average: &Self, gradients: &[Option<TensorRef<'_>>]) -> Option<RuleId> {
        match (self.preset.method, average.preset.method) {
            (Method::Elementwise(_), Method::Elementwise(rule)) => {
                gradients.iter().flatten().all(|gradient| gradient.rows.is_none()).then_some(rule)
            }
            _ => None,
        }
    }

    /// Whether sums of squares come from the pass over the jobs.
    pub(super) fn measures_in_pass(&self) -> bool {
        matches!(self.preset.method, Method::Elementwise(_))
    }

    /// The parameters before an update that takes no sums in its pass.
    pub(super) fn before(
        &mut self,
        params: &[TensorMut<'_>],
        gradients: &[Option<TensorRef<'_>>],
    ) -> Result<Vec<Option<Before>>> {
        let each = params.iter().zip(gradients);
        each.map(|(p, g)| g.as_ref().map(|g| Before::of(&p.reading(), g, &mut self.threads)).transpose()).collect()
    }

    /// Notes the sums of squares that jobs of these gradients had, in their order.
    pub(super) fn note_squares(&mut self, gradients: &[Option<TensorRef<'_>>], squares: Vec<Squares>) {
        let mut squares = squares.into_iter();
        self.squares.extend(gradients.iter().map(|g| g.as_ref().and_then(|_| squares.next())));
        if self.grad_scale != 1.0 {
            for squares in self.squares.iter_mut().flatten() {
                squares.gradient /= self.grad_scale * self.grad_scale;
            }
        }
    }

    /// The update of an average that did not follow the one before. The arrays were checked before that; where memory is
    /// missing now the average is torn, for the update was made.
    pub(super) fn join(
        &mut self,
        averages: &mut [TensorMut<'_>],
        params: &[TensorMut<'_>],
        wanted: impl Fn(usize) -> bool,
    ) {
        self.torn |= self.step(averages, &readings(params, wanted)).is_err();
    }
}

/// The parameters that are wanted, as what is read.
pub(super) fn readings<'p>(params: &'p [TensorMut<'_>], wanted: impl Fn(usize) -> bool) -> Vec<Option<TensorRef<'p>>> {
    params.iter().enumerate().map(|(i, p)| wanted(i).then(|| p.reading())).collect()
}
