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
use super::{axpy, dot, negative};
use crate::error::{Error, ErrorKind, Result};
use crate::real::Real;

/// L-BFGS over one flat vector.
pub type Lbfgs<F> = Descent<F, History<F>>;
/// Settings of a step.
pub type Settings = super::descent::Settings<Options>;
/// What outlives a step.
pub type State<F> = super::descent::State<F, History<F>>;

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

impl<F: Real> History<F> {
    /// From torch's lists; refuses lists of different lengths.
    pub fn from_lists(
        old_dirs: Vec<Arc<[F]>>,
        old_stps: Vec<Arc<[F]>>,
        ro: Vec<f64>,
        h_diag: f64,
        al: Vec<f64>,
    ) -> Result<Self> {
        let pairs = old_dirs.len();
        for (name, len) in [("old_stps", old_stps.len()), ("ro", ro.len())] {
            if len != pairs {
                let allowed = format_args!("as long as old_dirs ({pairs})");
                return Err(Error::refuse(ErrorKind::Value, "LBFGS", name, allowed, format_args!("length {len}")));
            }
        }
        let pairs = old_dirs.into_iter().zip(old_stps).zip(ro).map(|((y, s), ro)| Pair { y, s, ro }).collect();
        Ok(Self { pairs, h_diag, al })
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

    fn vectors(&self) -> impl Iterator<Item = (&'static str, &[F])> {
        self.pairs.iter().flat_map(|pair| [("old_dirs", &*pair.y), ("old_stps", &*pair.s)])
    }
}
