//! A fork copies locks as other threads hold them, and arrays as a step leaves them half-way. So it waits until no
//! thread is in an optimizer, and the others wait until it is over.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use pyo3::prelude::*;

/// How long a fork waits for other threads; then its child may be refused what they were in. Who forks from within a
/// call of its own, as from a gradient's conversion, waits that long for itself.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// How long other threads wait for a fork that another package's handlers hold up: those may wait for such a thread.
const LONGEST_HOLD: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_micros(50);

/// What several threads may want at once.
pub(crate) trait Shareable: Send + Sync {
    /// Whether somebody is in there.
    fn is_busy(&self) -> bool;

    /// Called in the child of a fork, where only the calling thread is left.
    fn forked(&self) {}
}

impl<T: Send> Shareable for Mutex<T> {
    fn is_busy(&self) -> bool {
        matches!(self.try_lock(), Err(TryLockError::WouldBlock))
    }
}

static KNOWN: Mutex<Vec<Weak<dyn Shareable>>> = Mutex::new(Vec::new());
/// Whether locks are held for a moment, to see if they are free.
static LOOKS: AtomicBool = AtomicBool::new(false);
/// Threads that are about to be in an optimizer, or in one, without a lock of a table.
static INSIDE: AtomicUsize = AtomicUsize::new(0);
/// Forks under way.
static FORKS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Those of this thread.
    static OWN: Cell<usize> = const { Cell::new(0) };
}

fn known() -> MutexGuard<'static, Vec<Weak<dyn Shareable>>> {
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Forks wait for whoever is in there. Called with the interpreter lock, as is all that looks at the list.
pub(crate) fn heed(one: Weak<dyn Shareable>) {
    let mut known = known();
    if known.len() == known.capacity() {
        known.retain(|one| one.strong_count() > 0);
    }
    known.push(one);
}

fn living() -> Vec<Arc<dyn Shareable>> {
    known().iter().filter_map(Weak::upgrade).collect()
}

/// Whether who found a lock taken may have found a look at it, which is over now.
pub(crate) fn was_looked_at() -> bool {
    while LOOKS.load(Ordering::Acquire) {
        std::hint::spin_loop();
    }
    true
}

fn is_quiet() -> bool {
    let all = living();
    LOOKS.store(true, Ordering::Relaxed);
    let is_quiet = INSIDE.load(Ordering::Acquire) == 0 && all.iter().all(|one| !one.is_busy());
    LOOKS.store(false, Ordering::Release);
    is_quiet
}

/// Waits while another thread forks.
#[inline]
pub(crate) fn let_pass(py: Python<'_>) {
    let forks = || FORKS.load(Ordering::Relaxed);
    if forks() != 0 {
        wait(py, LONGEST_HOLD, || forks() <= OWN.get());
    }
}

/// Who is inside, until it is dropped.
pub(crate) struct Inside(());

impl Drop for Inside {
    fn drop(&mut self) {
        // In the child of a fork nobody was inside.
        let _ = INSIDE.fetch_update(Ordering::Release, Ordering::Relaxed, |count| count.checked_sub(1));
    }
}

/// Waits while another thread forks; then forks wait for the caller.
pub(crate) fn enter(py: Python<'_>) -> Inside {
    let_pass(py);
    // With the interpreter lock, so that no fork begins in between.
    INSIDE.fetch_add(1, Ordering::Relaxed);
    Inside(())
}

/// Waits without the interpreter lock, and looks with it.
fn wait(py: Python<'_>, longest: Duration, is_over: impl Fn() -> bool) {
    let end = Instant::now() + longest;
    while !is_over() && Instant::now() < end {
        py.detach(|| std::thread::sleep(PAUSE));
    }
}

/// Before `os.fork`.
#[pyfunction]
pub(crate) fn before_fork(py: Python<'_>) {
    OWN.set(OWN.get() + 1);
    FORKS.fetch_add(1, Ordering::Relaxed);
    wait(py, LONGEST_WAIT, is_quiet);
}

/// After it, in the parent, or in the child, where no other thread is.
#[pyfunction]
pub(crate) fn after_fork(in_child: bool) {
    let own = OWN.replace(OWN.get().saturating_sub(1));
    if in_child {
        OWN.set(0);
        FORKS.store(0, Ordering::Relaxed);
        INSIDE.store(0, Ordering::Relaxed);
        living().iter().for_each(|one| one.forked());
    } else if own > 0 {
        FORKS.fetch_sub(1, Ordering::Relaxed);
    }
}
