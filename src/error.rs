//! Errors in one sentence form: `place: name must be allowed, got value; remedy`.
//!
//! What a caller may react to is the [`ErrorKind`]; the sentence is for people. The binding maps each
//! kind to one Python exception class in one place.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;

/// A shape as NumPy prints it.
pub fn shape_text(shape: &[usize]) -> String {
    let axes: Vec<_> = shape.iter().map(usize::to_string).collect();
    if axes.len() == 1 { format!("({},)", axes[0]) } else { format!("({})", axes.join(", ")) }
}

/// A sentence whose parts may come from anywhere, without what a terminal would obey.
fn printable(sentence: String) -> String {
    let obeyed = |c: char| c.is_control() && c != '\n';
    if !sentence.contains(obeyed) {
        return sentence;
    }
    sentence.chars().fold(String::new(), |mut text, c| {
        if obeyed(c) {
            text.extend(c.escape_default())
        } else {
            text.push(c)
        }
        text
    })
}

/// Result of the engine's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as a caller may branch on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A value out of its range, or an array of the wrong shape, layout, overlap or access.
    Value,
    /// A value or an array of the wrong type or dtype.
    Type,
    /// A name nobody knows.
    Name,
    /// A gradient that is not finite where the caller asked for an error.
    Nonfinite,
    /// Two threads in one optimizer at once.
    Concurrent,
    /// The optimizer was torn by a panic or a lost device; parameters and state must be restored first.
    Torn,
    /// No adapter fits the request.
    NoAdapter,
    /// The device refused or failed an operation.
    Device,
    /// The device is gone.
    DeviceLost,
    /// A GPU optimizer used in a forked child.
    Forked,
    /// An allocation failed.
    OutOfMemory,
    /// A file that is damaged, hostile or of another format.
    File,
    /// A file of a later version of the format.
    Newer,
    /// The operating system refused a file operation.
    Io,
    /// A defect of this library.
    Internal,
}

/// An error of the engine: a kind, a sentence, and the cause where there is one.
#[derive(Debug, thiserror::Error)]
#[error("{sentence}")]
pub struct Error {
    kind: ErrorKind,
    sentence: String,
    #[source]
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// `place: name must be allowed, got value`.
    pub fn refuse(
        kind: ErrorKind,
        place: impl fmt::Display,
        name: impl fmt::Display,
        allowed: impl fmt::Display,
        got: impl fmt::Display,
    ) -> Self {
        Self::plain(kind, format!("{place}: {name} must be {allowed}, got {got}"))
    }

    /// A sentence for what does not fit the form (a device that failed, a file the system refused).
    pub fn plain(kind: ErrorKind, sentence: impl Into<String>) -> Self {
        Self { kind, sentence: printable(sentence.into()), source: None }
    }

    /// Appends `; remedy`.
    #[must_use]
    pub fn with_remedy(mut self, remedy: impl Into<Cow<'static, str>>) -> Self {
        self.sentence.push_str("; ");
        self.sentence.push_str(&remedy.into());
        self
    }

    /// Keeps the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What a caller may branch on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_hold_nothing_that_a_terminal_obeys() {
        let error = Error::refuse(ErrorKind::Value, "file", "name", "plain", "\u{1b}[2Jä\u{7}\u{9b}");
        assert_eq!(error.to_string(), "file: name must be plain, got \\u{1b}[2Jä\\u{7}\\u{9b}");
    }
}
