//! Methods that evaluate the loss several times in a step: L-BFGS and nonlinear conjugate gradients.
//!
//! Each is a machine that asks and is told. It owns no parameter and calls nobody, so the caller may
//! evaluate wherever it likes, fail halfway, and drop the machine at any question:
//!
//! ```
//! use roptim::closure::{Ask, Lbfgs, Machine, lbfgs::Options, descent::Settings};
//!
//! let mut machine = Lbfgs::<f64>::default();
//! let settings = Settings { method: Options { strong_wolfe: true, ..Options::default() }, ..Settings::default() };
//! machine.begin(&settings, vec![3.0, -4.0])?;
//! let mut ask = Ask::Evaluate;
//! while ask == Ask::Evaluate {
//!     let x = machine.point();
//!     let (loss, gradient) = (x[0] * x[0] + 5.0 * x[1] * x[1], [2.0 * x[0], 10.0 * x[1]]);
//!     ask = machine.tell(loss, gradient);
//! }
//! assert!(machine.point().iter().all(|x| x.abs() < 1e-3));
//! # Ok::<(), roptim::Error>(())
//! ```
//!
//! | file | holds |
//! |---|---|
//! | [`descent`] | one step: iterations, stopping, what outlives a step |
//! | [`wolfe`] | the line search |
//! | [`lbfgs`], [`conjugate`] | a direction and a first trial step each |
//! | [`parts`] | state as named values |
//! | [`vector`] | what is done with vectors, and the CPU's |
//!
//! Vectors are of the parameters' type; their products are summed in f64 in a fixed order, and step
//! lengths, losses and directional derivatives are f64, so the points do not depend on the machine.

use std::fmt::Debug;

use crate::hyper::Hypers;
use crate::rule::Declaration;
use descent::Method;
use vector::Vector;

pub mod conjugate;
pub mod descent;
pub mod lbfgs;
pub mod parts;
pub mod vector;
pub mod wolfe;

pub use conjugate::ConjugateGradient;
pub use lbfgs::Lbfgs;

/// What a machine wants next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// Loss and gradient at [`Machine::point`].
    Evaluate,
    /// Nothing: the step is over, and [`Machine::point`] is where it ended.
    Done,
}

/// The questions of either method.
pub trait Machine<V> {
    /// Answers the last question.
    ///
    /// A loss, gradient or point that is not finite, or a gradient of another length than the point,
    /// counts as a failed trial. Without a question the answer is ignored.
    fn tell(&mut self, loss: f64, gradient: impl Into<V>) -> Ask;

    /// Where to evaluate next; after [`Ask::Done`] where the step ended.
    fn point(&self) -> &V;

    /// The loss where the step began, NaN before it was told.
    fn first_loss(&self) -> f64;
}

/// A closure method as the registry knows it.
pub trait ClosureRule: Debug + 'static {
    /// What it declares.
    const DECLARATION: Declaration;
    /// What a user chooses besides what all of them have.
    type Options: Clone + Debug + Send;
    /// What sets it apart from the others.
    type Memory<V: Vector>: Method<V, Options = Self::Options> + Send + Sync;

    /// The choices in a group's hyperparameters.
    fn options(h: &Hypers) -> Self::Options;
}

#[cfg(test)]
mod tests;
