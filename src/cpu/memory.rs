//! The executor's only access to arrays: blocks in, blocks out.
//!
//! An array in C order is a slice for the time of one sweep. Every other layout and storage type is
//! copied element by element into local blocks and back, so that all take the same arithmetic.

use crate::linear::SUM_BLOCK;
use crate::real::{Element, Real, StorageVisitor, with_storage};
use crate::tensor::{RawTensor, Rows, Strides, TensorMut, TensorRef};

/// Elements per block of the copying path.
pub(super) const BLOCK: usize = 256;

/// Calls `visit(k, offset)` for the elements `start..start + n` in C order with their byte offsets.
fn walk(strides: &Strides, start: usize, n: usize, mut visit: impl FnMut(usize, isize)) {
    let axes = strides.shape.len();
    // NumPy has at most 64 axes, and complex numbers are one more; a caller of the engine may have any number.
    const FEW: usize = 65;
    let (mut few, mut many) = ([0usize; FEW], Vec::new());
    let index = if axes <= FEW {
        &mut few[..axes]
    } else {
        many.resize(axes, 0usize);
        &mut many
    };
    let (mut rest, mut offset) = (start, 0isize);
    for axis in (0..axes).rev() {
        index[axis] = rest % strides.shape[axis];
        rest /= strides.shape[axis];
        offset += index[axis] as isize * strides.bytes[axis];
    }
    for k in 0..n {
        visit(k, offset);
        for axis in (0..axes).rev() {
            index[axis] += 1;
            offset += strides.bytes[axis];
            if index[axis] < strides.shape[axis] {
                break;
            }
            offset -= index[axis] as isize * strides.bytes[axis];
            index[axis] = 0;
        }
    }
}

/// Calls `visit(k, address)` for the elements `start..start + n`, counted among `rows` if given, else in C
/// order.
///
/// # Safety
/// The elements lie within the tensor, which stores `E` in allocated memory.
#[inline(always)]
unsafe fn addresses<E>(
    of: &RawTensor,
    rows: Option<&Rows>,
    start: usize,
    n: usize,
    mut visit: impl FnMut(usize, *mut E),
) {
    debug_assert!(start + n <= rows.map_or(of.len, Rows::len));
    match (&of.strides, rows) {
        (None, None) => {
            for k in 0..n {
                // SAFETY: start + n ≤ len.
                visit(k, unsafe { of.ptr.cast::<E>().add(start + k) });
            }
        }
        // SAFETY: the rows lie within the tensor.
        (None, Some(rows)) => rows.walk(start, n, |k, at| visit(k, unsafe { of.ptr.cast::<E>().add(at) })),
        (Some(strides), None) => walk(strides, start, n, |k, offset| {
            // SAFETY: the offset belongs to an element of the tensor.
            visit(k, unsafe { of.ptr.offset(offset) }.cast());
        }),
        (Some(strides), Some(rows)) => rows.walk(start, n, |k, at| {
            // SAFETY: as above.
            walk(strides, at, 1, |_, offset| visit(k, unsafe { of.ptr.offset(offset) }.cast()));
        }),
    }
}

/// Copies the elements from `start` on into the block, widened.
///
/// # Safety
/// They lie within the tensor, which stores `E` in allocated, aligned memory.
#[inline(always)]
pub(super) unsafe fn load<E: Element<F>, F: Real>(from: &RawTensor, start: usize, block: &mut [F]) {
    // SAFETY: the caller's duty.
    unsafe { load_rows::<E, F>(from, None, start, block) };
}

/// [`load`], of elements counted among `rows` if given.
///
/// # Safety
/// As for [`load`].
#[inline(always)]
pub(super) unsafe fn load_rows<E: Element<F>, F: Real>(
    from: &RawTensor,
    rows: Option<&Rows>,
    start: usize,
    block: &mut [F],
) {
    // SAFETY: the caller's duty; the address is an element's.
    unsafe { addresses::<E>(from, rows, start, block.len(), |k, element| block[k] = element.read().widen()) };
}

/// Copies the block to the elements from `start` on, counted among `rows` if given, narrowed.
///
/// # Safety
/// As for [`load`], and the memory is writable and touched by no other thread of the step.
#[inline(always)]
pub(super) unsafe fn store_rows<E: Element<F>, F: Real>(
    to: &RawTensor,
    rows: Option<&Rows>,
    start: usize,
    block: &[F],
) {
    // SAFETY: the caller's duty; the address is an element's.
    unsafe { addresses::<E>(to, rows, start, block.len(), |k, element| element.write(E::narrow(block[k]))) };
}

/// Writes the values of rows to their places.
///
/// # Safety
/// `from` holds as many elements as the rows, which lie within `to`; both are allocated, aligned and of the
/// same dtype, and `to` is writable and overlaps nothing.
pub(crate) unsafe fn scatter(from: &RawTensor, rows: &Rows, to: &RawTensor) {
    struct Scatter<'a>(&'a RawTensor, &'a Rows, &'a RawTensor);

    impl StorageVisitor for Scatter<'_> {
        type Out = ();

        fn visit<E: Element<F>, G: Element<F>, F: Real>(self) {
            let mut block = [F::ZERO; BLOCK];
            for start in (0..self.1.len()).step_by(BLOCK) {
                let block = &mut block[..BLOCK.min(self.1.len() - start)];
                // SAFETY: the duty of `scatter`'s caller.
                unsafe {
                    load::<E, F>(self.0, start, block);
                    store_rows::<E, F>(self.2, Some(self.1), start, block);
                }
            }
        }
    }
    with_storage(from.dtype, from.dtype, Scatter(from, rows, to));
}

/// Copies all numbers of a tensor, zeros where it is sparse and has none.
pub(crate) fn gather<V: Real>(from: &TensorRef<'_>, out: &mut [V]) {
    if from.rows.is_some() {
        out.fill(V::ZERO);
    }
    gather_with(from, out, |_, x| x);
}

/// Adds all numbers of a tensor.
pub(crate) fn add<V: Real>(from: &TensorRef<'_>, out: &mut [V]) {
    gather_with(from, out, |old, x| old + x);
}

/// Joins all numbers of a tensor with others.
fn gather_with<V: Real>(from: &TensorRef<'_>, out: &mut [V], join: impl Fn(V, V) -> V) {
    struct Gather<'a, V, J>(&'a TensorRef<'a>, &'a mut [V], J);

    impl<V: Real, J: Fn(V, V) -> V> StorageVisitor for Gather<'_, V, J> {
        type Out = ();

        fn visit<E: Element<F>, G: Element<F>, F: Real>(self) {
            let Self(TensorRef { raw, rows, .. }, out, join) = self;
            let mut block = [F::ZERO; BLOCK];
            for start in (0..raw.len).step_by(BLOCK) {
                let block = &mut block[..BLOCK.min(raw.len - start)];
                // SAFETY: a TensorRef describes allocated, aligned memory, which the block lies within.
                unsafe { load::<E, F>(raw, start, block) };
                let value = |k: usize| V::from_f64(block[k].to_f64());
                match rows {
                    Some(rows) => rows.walk(start, block.len(), |k, at| out[at] = join(out[at], value(k))),
                    None => {
                        let out = out[start..start + block.len()].iter_mut();
                        out.enumerate().for_each(|(k, out)| *out = join(*out, value(k)));
                    }
                }
            }
        }
    }
    with_storage(from.raw.dtype, from.raw.dtype, Gather(from, out, join));
}

/// Overwrites a tensor with as many numbers as it has.
pub(crate) fn spread<V: Real>(from: &[V], to: &mut TensorMut<'_>) {
    struct Spread<'a, V>(&'a [V], &'a RawTensor);

    impl<V: Real> StorageVisitor for Spread<'_, V> {
        type Out = ();

        fn visit<E: Element<F>, G: Element<F>, F: Real>(self) {
            let mut block = [F::ZERO; BLOCK];
            for (i, from) in self.0.chunks(BLOCK).enumerate() {
                let block = &mut block[..from.len()];
                block.iter_mut().zip(from).for_each(|(to, from)| *to = F::from_f64(from.to_f64()));
                // SAFETY: a TensorMut describes allocated, aligned, writable memory of the asserted length.
                unsafe { store_rows::<E, F>(self.1, None, i * BLOCK, block) };
            }
        }
    }
    assert_eq!(from.len(), to.raw.len, "as many numbers as the tensor has");
    with_storage(to.raw.dtype, to.raw.dtype, Spread(from, &to.raw));
}

/// Sets elements `start..start + n` to zero.
///
/// # Safety
/// The range lies within the tensor, which is allocated, aligned, writable and touched by no other thread of the step.
pub(crate) unsafe fn clear(x: &RawTensor, start: usize, n: usize) {
    struct Clear<'a>(&'a RawTensor, usize, usize);

    impl StorageVisitor for Clear<'_> {
        type Out = ();

        fn visit<E: Element<F>, G: Element<F>, F: Real>(self) {
            let Self(x, start, n) = self;
            for at in (start..start + n).step_by(BLOCK) {
                // SAFETY: the duty of `clear`'s caller.
                unsafe { store_rows::<E, F>(x, None, at, &[F::ZERO; BLOCK][..BLOCK.min(start + n - at)]) };
            }
        }
    }
    with_storage(x.dtype, x.dtype, Clear(x, start, n));
}

/// Part of an array, counted among `rows` if given: where it lies if it is in C order and of the compute type, else a copy.
///
/// # Safety
/// It lies within the array, which is allocated, aligned, stores `E` and is written by nobody during the borrow.
#[inline(always)]
pub(super) unsafe fn part<'a, E: Element<F>, F: Real>(
    x: &RawTensor,
    rows: Option<&Rows>,
    start: usize,
    len: usize,
    copy: &'a mut Option<[F; SUM_BLOCK]>,
) -> &'a [F] {
    if E::IS_COMPUTE_TYPE && x.strides.is_none() && rows.is_none() {
        // SAFETY: the caller's duty.
        return unsafe { whole(x.ptr, start, len) };
    }
    let copy = &mut copy.get_or_insert([F::ZERO; SUM_BLOCK])[..len];
    for (i, block) in copy.chunks_mut(BLOCK).enumerate() {
        // SAFETY: the caller's duty.
        unsafe { load_rows::<E, F>(x, rows, start + i * BLOCK, block) };
    }
    copy
}

/// Elements `start..start + n` of an array in C order, where they lie. Empty for `n = 0`.
///
/// # Safety
/// For the time of the borrow the range lies within an allocated, aligned, initialized array of `F`, and
/// nothing in the step writes to it. Another thread that writes to it from Python meanwhile may leave torn
/// values there, as in any NumPy operation; the optimizer keeps its own threads away by checking overlap.
#[inline(always)]
pub(super) unsafe fn whole<'a, F: Real>(ptr: *mut u8, start: usize, n: usize) -> &'a [F] {
    if n == 0 {
        return &[];
    }
    // SAFETY: the caller's duty.
    unsafe { std::slice::from_raw_parts(ptr.cast::<F>().add(start), n) }
}

/// [`whole`], to write to.
///
/// # Safety
/// As for [`whole`], and nothing else in the step reads or writes the range.
#[inline(always)]
pub(super) unsafe fn whole_mut<'a, F: Real>(ptr: *mut u8, start: usize, n: usize) -> &'a mut [F] {
    if n == 0 {
        return &mut [];
    }
    // SAFETY: the caller's duty.
    unsafe { std::slice::from_raw_parts_mut(ptr.cast::<F>().add(start), n) }
}

/// A number that tells a tensor's values from others.
pub fn fingerprint(x: &TensorRef<'_>) -> u64 {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    // SAFETY: a TensorRef describes allocated, initialized memory.
    unsafe { read_bytes(&x.raw, 0, x.raw.len, |_, bytes| hash.update(bytes)) };
    hash.digest()
}

/// Hands the bytes of elements `start..start + n` in C order to `sink` with their offset from the first:
/// at once where the array is in C order, else block by block.
///
/// # Safety
/// The range lies within the tensor, which is allocated and initialized.
pub(crate) unsafe fn read_bytes(from: &RawTensor, start: usize, n: usize, mut sink: impl FnMut(usize, &[u8])) {
    let size = from.dtype.size();
    let Some(strides) = &from.strides else {
        // SAFETY: start + n ≤ len.
        return sink(0, unsafe { std::slice::from_raw_parts(from.ptr.add(start * size), n * size) });
    };
    let mut block = [0u8; BLOCK * 8];
    for at in (0..n).step_by(BLOCK) {
        let count = BLOCK.min(n - at);
        walk(strides, start + at, count, |k, offset| {
            // SAFETY: the offset belongs to an element of the tensor.
            let element = unsafe { std::slice::from_raw_parts(from.ptr.offset(offset), size) };
            block[k * size..][..size].copy_from_slice(element);
        });
        sink(at * size, &block[..count * size]);
    }
}

/// Writes elements in C order, from element `start` on.
///
/// # Safety
/// The range lies within the tensor, which is allocated, writable and touched by no other thread of the
/// step.
#[cfg(feature = "gpu")]
pub(crate) unsafe fn write_bytes(to: &RawTensor, start: usize, bytes: &[u8]) {
    let size = to.dtype.size();
    match &to.strides {
        // SAFETY: the caller keeps the range within the tensor; `bytes` is the engine's own memory.
        None => unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.ptr.add(start * size), bytes.len()) },
        Some(strides) => walk(strides, start, bytes.len() / size, |k, offset| {
            let element = &bytes[k * size..][..size];
            // SAFETY: the offset belongs to an element of the tensor.
            unsafe { std::ptr::copy_nonoverlapping(element.as_ptr(), to.ptr.offset(offset), size) };
        }),
    }
}
