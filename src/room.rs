//! Lists whose length the user's data decides. Where there is no memory for one it is an error, never the end of the
//! process, which is what an allocation of Rust's own lists is that fails.

use crate::error::{Error, ErrorKind, Result};

/// The error of memory that is not there.
pub(crate) fn refusal(bytes: usize, what: &str) -> Error {
    Error::plain(ErrorKind::OutOfMemory, format!("roptim: {bytes} bytes for {what} could not be allocated"))
}

/// Makes room for as many elements in all.
#[inline]
pub(crate) fn reserve<T>(list: &mut Vec<T>, len: usize, what: &str) -> Result<()> {
    if len <= list.capacity() {
        return Ok(());
    }
    let more = len - list.len();
    list.try_reserve_exact(more).map_err(|_| refusal(len.saturating_mul(size_of::<T>()), what))
}

/// A list of one value.
pub(crate) fn filled<T: Clone>(len: usize, value: T, what: &str) -> Result<Vec<T>> {
    let mut list = Vec::new();
    reserve(&mut list, len, what)?;
    list.resize(len, value);
    Ok(list)
}

/// A list of what is counted beforehand.
pub(crate) fn listed<T>(items: impl ExactSizeIterator<Item = T>, what: &str) -> Result<Vec<T>> {
    let mut list = Vec::new();
    reserve(&mut list, items.len(), what)?;
    list.extend(items);
    Ok(list)
}

/// A copy.
pub(crate) fn copied<T: Copy>(from: &[T], what: &str) -> Result<Vec<T>> {
    let mut list = Vec::new();
    reserve(&mut list, from.len(), what)?;
    list.extend_from_slice(from);
    Ok(list)
}

/// An empty list with the memory of another, for what may not be kept itself: the standard library reuses the memory
/// where the elements of both have a size and an alignment, and else allocates later.
pub fn recycled<A, B>(mut list: Vec<A>) -> Vec<B> {
    list.clear();
    list.into_iter().map(|_| unreachable!("it was emptied")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_had_is_an_error() {
        let error = filled(usize::MAX / 16, 0u64, "a test").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfMemory);
        let bytes = usize::MAX / 16 * 8;
        assert_eq!(error.to_string(), format!("roptim: {bytes} bytes for a test could not be allocated"));
        assert_eq!(copied(&[1, 2], "a test").unwrap(), [1, 2]);
        assert_eq!(listed([1, 2].iter().map(|x| x + 1), "a test").unwrap(), [2, 3]);
    }

    #[test]
    fn a_list_is_emptied_and_keeps_its_memory() {
        let list: Vec<[u64; 2]> = vec![[1, 2]; 100];
        let memory = (list.as_ptr().addr(), list.capacity());
        let others: Vec<Option<(Box<u64>, u64)>> = recycled(list);
        assert!(others.is_empty());
        assert_eq!((others.as_ptr().addr(), others.capacity()), memory);
        let again: Vec<[u64; 2]> = recycled(others);
        assert_eq!((again.as_ptr().addr(), again.capacity()), memory);
    }
}
