//! Panics on demand, for tests of what a defect in the middle of a step leaves behind.
//!
//! Work that is cut into parts passes a [`point`] at each of them. Without a drill that is one relaxed load, which
//! nobody notices beside the elements of a part.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Points until the panic, 0 without a drill.
static LEFT: AtomicUsize = AtomicUsize::new(0);
/// Whether only points on the engine's own threads count.
static ON_POOL: AtomicBool = AtomicBool::new(false);

/// From now on the n-th point panics, whichever optimizer comes by; none with 0. With `on_pool` only points on the
/// engine's own threads count. Returns how many were left of the drill before.
pub fn begin(n: usize, on_pool: bool) -> usize {
    ON_POOL.store(on_pool, Ordering::Relaxed);
    LEFT.swap(n, Ordering::Relaxed)
}

/// A place where a drill may panic.
#[inline(always)]
pub(crate) fn point() {
    if LEFT.load(Ordering::Relaxed) != 0 {
        passed();
    }
}

#[cold]
#[inline(never)]
fn passed() {
    let counts = !ON_POOL.load(Ordering::Relaxed) || rayon::current_thread_index().is_some();
    // Threads that pass at once agree on whose turn it is.
    let take = |left: usize| left.checked_sub(1);
    assert!(!(counts && LEFT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) == Ok(1)), "a drill");
}
