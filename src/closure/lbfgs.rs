//! L-BFGS.
//!
//! Liu, Nocedal: *On the limited memory BFGS method for large scale optimization*, Mathematical
//! Programming 45, 1989. With the last k pairs s = xᵢ₊₁ − xᵢ, y = gᵢ₊₁ − gᵢ and ρ = 1/(y·s), the direction
//! d = −H·g comes from the two-loop recursion:
//!
//! ```text
//! q = −g
//! newest to oldest:  αᵢ = ρᵢ·(sᵢ·q);   q ← q − αᵢ·yᵢ
//! r = γ·q,           γ = (y·s)/(y·y) of the newest pair
//! oldest to newest:  r ← r + (αᵢ − ρᵢ·(yᵢ·r))·sᵢ
//! d = r
//! ```
//!
//! | symbol | torch's name |
//! |---|---|
//! | y, s, ρ | state `old_dirs`, `old_stps`, `ro` |
//! | γ | state `H_diag` |
//! | α | state `al` |
//! | k | `history_size` |
//!
//! Directions and steps in torch's order: a pair is kept only where y·s > 1e-10, the first step is
//! min(1, 1/Σ|g|)·lr, later ones begin at lr, and without strong Wolfe search they are lr.
//!
//! Deviations from torch, besides those of [`descent`](super::descent): a smaller `history_size` than the
//! state's drops the oldest pairs (torch keeps them and grows on), and 0 counts as 1.

use std::collections::VecDeque;
use std::sync::Arc;

use super::descent::{Descent, Last, Method};
use super::parts::{Part, Parts};
use super::{axpy, dot, negative};
use crate::error::Result;
use crate::real::Real;

/// L-BFGS over one flat vector.
pub type Lbfgs<F> = Descent<F, History<F>>;
/// Settings of a step.
pub type Settings = super::descent::Settings<Options>;
/// What outlives a step.
pub type State<F> = super::descent::State<F, History<F>>;

/// Longest list that is filled up with None.
const MAX_FILLED: usize = 10_000;
/// The least y·s of a pair worth keeping.
const MIN_CURVATURE: f64 = 1e-10;

/// What a user chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Pairs to remember.
    pub history_size: usize,
    /// Whether to search for steps.
    pub strong_wolfe: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { history_size: 100, strong_wolfe: false }
    }
}

/// A step and what it did to the gradient.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair<F> {
    /// Difference of gradients.
    pub y: Arc<[F]>,
    /// Difference of points.
    pub s: Arc<[F]>,
    /// 1/(y·s).
    pub ro: f64,
}

/// The pairs, oldest first.
#[derive(Debug, Clone, PartialEq)]
pub struct History<F> {
    /// At most `history_size`.
    pub pairs: VecDeque<Pair<F>>,
    /// γ.
    pub h_diag: f64,
    /// α of each pair in the last recursion: scratch that torch shows.
    pub al: Vec<f64>,
}

impl<F> Default for History<F> {
    fn default() -> Self {
        Self { pairs: VecDeque::new(), h_diag: 1.0, al: Vec::new() }
    }
}

impl<F: Real> Method<F> for History<F> {
    type Options = Options;
    const NAME: &'static str = "LBFGS";
    const CURVATURE: f64 = 0.9;

    fn searches(options: &Options) -> bool {
        options.strong_wolfe
    }

    fn direction(&mut self, options: &Options, last: &Last<F>, g: &[F]) -> Vec<F> {
        let t = F::from_f64(last.t);
        let y: Arc<[F]> = g.iter().zip(&*last.prev_flat_grad).map(|(&g, &g_prev)| g - g_prev).collect();
        let s: Arc<[F]> = last.d.iter().map(|&d| d * t).collect();
        let ys = dot(&y, &s);
        if ys > MIN_CURVATURE {
            let room = options.history_size.max(1) - 1;
            self.pairs.drain(..self.pairs.len().saturating_sub(room));
            self.h_diag = ys / dot(&y, &y);
            self.pairs.push_back(Pair { y, s, ro: 1.0 / ys });
        }

        self.al = vec![0.0; self.pairs.len()];
        let mut q = negative(g);
        for (Pair { y, s, ro }, al) in self.pairs.iter().zip(&mut self.al).rev() {
            *al = dot(s, &q) * ro;
            axpy(&mut q, -*al, y);
        }
        let h_diag = F::from_f64(self.h_diag);
        let mut r = q;
        r.iter_mut().for_each(|r| *r = *r * h_diag);
        for (Pair { y, s, ro }, al) in self.pairs.iter().zip(&self.al) {
            let be = dot(y, &r) * ro;
            axpy(&mut r, al - be, s);
        }
        r
    }

    fn trial_step(lr: f64, _last: &Last<F>, _slope: f64) -> Option<f64> {
        Some(lr)
    }

    fn parts(&self, options: &Options) -> Vec<(&'static str, Part<F>)> {
        let list = |of: fn(&Pair<F>) -> Part<F>| Part::List(self.pairs.iter().map(of).collect());
        let mut parts = vec![
            ("old_dirs", list(|pair| Part::Vector(pair.y.clone()))),
            ("old_stps", list(|pair| Part::Vector(pair.s.clone()))),
            ("ro", list(|pair| Part::Number(pair.ro))),
            ("H_diag", Part::Number(self.h_diag)),
        ];
        if !self.al.is_empty() {
            // torch fills its list up to the history's size, however large.
            let mut al: Vec<_> = self.al.iter().map(|&al| Part::Number(al)).collect();
            al.resize(options.history_size.min(MAX_FILLED).max(al.len()), Part::None);
            parts.push(("al", Part::List(al)));
        }
        parts
    }

    fn from_parts(parts: &mut Parts<F>) -> Result<Self> {
        let (y, s) = (parts.vectors("old_dirs")?, parts.vectors("old_stps")?);
        let (ro, h_diag, al) = (parts.numbers("ro")?, parts.number("H_diag")?, parts.numbers("al")?);
        let pairs = ("old_dirs", y.len());
        parts.same_length([("old_stps", s.len()), pairs])?;
        parts.same_length([("ro", ro.len()), pairs])?;
        let pairs = y.into_iter().zip(s).zip(ro).map(|((y, s), ro)| Pair { y, s, ro }).collect();
        Ok(Self { pairs, h_diag, al })
    }
}
