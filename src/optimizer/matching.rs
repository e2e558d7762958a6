//! Which parameter and group of a saved state goes to which of an optimizer.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Error, ErrorKind, Result};
use crate::hyper::Value;

/// How a saved state is taken up where it differs from the optimizer. The default refuses every difference.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Parameters that the saved state lacks begin anew, in place of an error.
    pub init_missing: bool,
    /// Parameters that only the saved state has are left out, in place of an error.
    pub drop_unexpected: bool,
    /// Names of parameters in the saved state, and what they are called here.
    pub rename: BTreeMap<String, String>,
    /// Hyperparameters stay as they are, in place of the saved ones.
    pub keep_hypers: bool,
    /// Hyperparameters that every group gets after that.
    pub hypers: Vec<(String, Value)>,
}

/// What a load did, or would do.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LoadReport {
    /// Parameters that have the saved state, by index.
    pub loaded: Vec<usize>,
    /// Parameters that begin anew, by index.
    pub initialised: Vec<usize>,
    /// Parameters of the saved state that were left out: names, or indices as text.
    pub dropped: Vec<String>,
    /// For each group, the saved group that it corresponds to.
    pub groups: Vec<Option<usize>>,
    /// Hyperparameters that are different now.
    pub changed: Vec<HyperChange>,
    /// The class whose state was converted, if it is another one.
    pub converted_from: Option<String>,
    /// Hyperparameters that stay as they are, since they mean something else there.
    pub kept: Vec<&'static str>,
}

/// A hyperparameter before and after a load.
#[derive(Debug, Clone, PartialEq)]
pub struct HyperChange {
    /// Index of the group.
    pub group: usize,
    /// Its name.
    pub name: &'static str,
    /// Before.
    pub old: Value,
    /// After.
    pub new: Value,
}

/// The parameters of one group: how each is known, and the names where there are some.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Members {
    /// Indices.
    pub params: Vec<usize>,
    /// Names, in the same order.
    pub names: Option<Vec<String>>,
}

/// What goes where.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Matching {
    /// Index of a parameter here, and in the saved state.
    pub sources: BTreeMap<usize, usize>,
    /// Parameters here that the saved state lacks.
    pub initialised: Vec<usize>,
    /// Parameters of the saved state that are left out: names, or indices as text.
    pub dropped: Vec<String>,
    /// For each group here, the saved group it corresponds to. None where all its parameters are new, and where
    /// hyperparameters are kept and it corresponds to none or several.
    pub groups: Vec<Option<usize>>,
}

/// Matches parameters by name where both sides have names, else by position; and groups by what is in them.
///
/// `place` starts the messages.
pub fn matched(place: &str, ours: &[Members], theirs: &[Members], options: &LoadOptions) -> Result<Matching> {
    let matching = Matcher { place, ours, theirs, options };
    matching.check_saved()?;
    let named = |side: &[Members]| side.iter().all(|group| group.names.is_some() || group.params.is_empty());
    let pairs = if named(ours) && named(theirs) {
        matching.by_name()?
    } else if let Some(old) = options.rename.keys().next() {
        let got = format!("one for {old:?}");
        return matching.refuse("rename", "empty unless both sides have names", got);
    } else {
        matching.by_position()?
    };
    matching.finish(pairs)
}

/// Group and index of a parameter here, and of the one in the saved state.
struct Pair {
    here: (usize, usize),
    saved: (usize, usize),
}

struct Matcher<'m> {
    place: &'m str,
    ours: &'m [Members],
    theirs: &'m [Members],
    options: &'m LoadOptions,
}

impl Matcher<'_> {
    fn refuse<T>(
        &self,
        name: impl std::fmt::Display,
        allowed: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Result<T> {
        Err(Error::refuse(ErrorKind::Value, self.place, name, allowed, got))
    }

    fn check_saved(&self) -> Result<()> {
        let mut known = BTreeSet::new();
        if let Some(twice) = self.theirs.iter().flat_map(|group| &group.params).find(|&&i| !known.insert(i)) {
            return self.refuse("indices of parameters", "different", format!("{twice} twice"));
        }
        for (g, group) in self.theirs.iter().enumerate() {
            if let Some(names) = &group.names
                && names.len() != group.params.len()
            {
                return self.refuse(format!("param_names of group {g}"), group.params.len(), names.len());
            }
        }
        Ok(())
    }

    fn by_name(&self) -> Result<Vec<Pair>> {
        let rename = &self.options.rename;
        let mut saved = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for (g, group) in self.theirs.iter().enumerate() {
            for (&i, name) in group.params.iter().zip(group.names.iter().flatten()) {
                seen.insert(name.as_str());
                let name = rename.get(name).unwrap_or(name);
                if saved.insert(name.as_str(), (g, i)).is_some() {
                    return self.refuse("names of the saved state", "different", format!("{name:?} twice"));
                }
            }
        }
        let here: BTreeSet<&str> =
            self.ours.iter().flat_map(|group| group.names.iter().flatten()).map(|n| &**n).collect();
        if let Some(old) = rename.keys().find(|old| !seen.contains(old.as_str())) {
            return self.refuse(
                "rename",
                format!("of names that the saved state has ({})", listed(&seen)),
                format!("{old:?}"),
            );
        }
        if let Some(new) = rename.values().find(|new| !here.contains(new.as_str())) {
            return self.refuse("rename", format!("to names of parameters ({})", listed(&here)), format!("{new:?}"));
        }
        let mut pairs = Vec::new();
        for (g, group) in self.ours.iter().enumerate() {
            for (&i, name) in group.params.iter().zip(group.names.iter().flatten()) {
                pairs.extend(saved.get(name.as_str()).map(|&saved| Pair { here: (g, i), saved }));
            }
        }
        let missing: Vec<&str> = here.iter().filter(|name| !saved.contains_key(*name)).copied().collect();
        let surplus: Vec<&str> = saved.keys().filter(|name| !here.contains(*name)).copied().collect();
        let no_missing = missing.is_empty() || self.options.init_missing;
        let no_surplus = surplus.is_empty() || self.options.drop_unexpected;
        if no_missing && no_surplus {
            return Ok(pairs);
        }
        let (mut got, mut remedies) = (Vec::new(), Vec::new());
        if !no_missing {
            got.push(format!("none for {}", listed(missing)));
            remedies.push("missing=\"init\" begins anew there");
        }
        if !no_surplus {
            got.push(format!("a surplus {}", listed(surplus)));
            remedies.push("unexpected=\"drop\" leaves them out");
        }
        if !no_missing && !no_surplus {
            remedies.push("rename={\"old\": \"new\"} matches them");
        }
        let error: Result<Vec<Pair>> =
            self.refuse("parameters of the saved state", format!("named {}", listed(&here)), got.join(" and "));
        error.map_err(|error| error.with_remedy(remedies.join(", ")))
    }

    fn by_position(&self) -> Result<Vec<Pair>> {
        let fits = |want: usize, got: usize| {
            (got >= want || self.options.init_missing) && (got <= want || self.options.drop_unexpected)
        };
        if !fits(self.ours.len(), self.theirs.len()) {
            return self.refuse("number of parameter groups", self.ours.len(), self.theirs.len());
        }
        let mut pairs = Vec::new();
        for (g, (ours, theirs)) in self.ours.iter().zip(self.theirs).enumerate() {
            let (want, got) = (ours.params.len(), theirs.params.len());
            if !fits(want, got) {
                return self.refuse(format!("number of parameters in group {g}"), want, got);
            }
            pairs.extend(
                ours.params
                    .iter()
                    .zip(&theirs.params)
                    .map(|(&here, &saved)| Pair { here: (g, here), saved: (g, saved) }),
            );
        }
        Ok(pairs)
    }

    fn finish(&self, pairs: Vec<Pair>) -> Result<Matching> {
        let mut origins = vec![BTreeSet::new(); self.ours.len()];
        let mut matching = Matching::default();
        for pair in &pairs {
            origins[pair.here.0].insert(pair.saved.0);
            matching.sources.insert(pair.here.1, pair.saved.1);
        }
        let taken: BTreeSet<usize> = pairs.iter().map(|pair| pair.saved.1).collect();
        for group in self.theirs {
            let names = group.names.as_ref();
            let left = group.params.iter().enumerate().filter(|(_, i)| !taken.contains(i));
            matching.dropped.extend(left.map(|(k, i)| names.map_or_else(|| i.to_string(), |names| names[k].clone())));
        }
        let all = self.ours.iter().flat_map(|group| &group.params);
        matching.initialised = all.filter(|i| !matching.sources.contains_key(i)).copied().collect();
        let mut used = BTreeSet::new();
        for (g, origins) in origins.iter().enumerate() {
            let empty = self.ours[g].params.is_empty();
            let origin = match origins.len() {
                // A group without parameters is only known by its place.
                0 => self.theirs.get(g).filter(|theirs| empty && theirs.params.is_empty()).map(|_| g),
                1 => origins.first().copied().filter(|&origin| used.insert(origin)),
                _ => None,
            };
            if origin.is_none() && !origins.is_empty() && !self.options.keep_hypers {
                let groups: Vec<String> = origins.iter().map(usize::to_string).collect();
                let got = if groups.len() > 1 {
                    format!("parameters of its groups {} together in group {g}", groups.join(", "))
                } else {
                    format!("parameters of its group {} in several", groups.join(", "))
                };
                let error: Result<Matching> = self.refuse("groups", "divided as in the saved state", got);
                let remedy = "hparams=\"keep\" takes no hyperparameters from it";
                return error.map_err(|error| error.with_remedy(remedy));
            }
            matching.groups.push(origin);
        }
        Ok(matching)
    }
}

/// Names in a message, the first of them where there are many.
fn listed<'n>(names: impl IntoIterator<Item = &'n (impl AsRef<str> + 'n + ?Sized)>) -> String {
    const SHOWN: usize = 10;
    let names: Vec<String> = names.into_iter().map(|name| format!("{:?}", name.as_ref())).collect();
    let rest = names.len().saturating_sub(SHOWN);
    let shown = names[..names.len() - rest].join(", ");
    if rest > 0 { format!("{shown} and {rest} more") } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(groups: &[&[&str]], first: usize) -> Vec<Members> {
        let mut next = first;
        let mut group = |names: &&[&str]| {
            let params = (next..next + names.len()).collect();
            next += names.len();
            Members { params, names: Some(names.iter().map(|name| (*name).to_owned()).collect()) }
        };
        groups.iter().map(&mut group).collect()
    }

    fn unnamed(groups: Vec<Members>) -> Vec<Members> {
        groups.into_iter().map(|group| Members { names: None, ..group }).collect()
    }

    fn gentle() -> LoadOptions {
        LoadOptions { init_missing: true, drop_unexpected: true, ..LoadOptions::default() }
    }

    fn refusal(ours: &[Members], theirs: &[Members], options: &LoadOptions) -> String {
        matched("load", ours, theirs, options).unwrap_err().to_string()
    }

    #[test]
    fn names_decide_whatever_the_order_of_parameters_and_groups() {
        let ours = named(&[&["a", "b"], &["c"]], 0);
        let theirs = named(&[&["c"], &["b", "a"]], 10);
        let matching = matched("load", &ours, &theirs, &LoadOptions::default()).unwrap();
        assert_eq!(matching.sources, BTreeMap::from([(0, 12), (1, 11), (2, 10)]));
        assert_eq!(matching.groups, [Some(1), Some(0)]);
    }

    #[test]
    fn differences_are_errors_unless_they_are_asked_for() {
        let (ours, theirs) = (named(&[&["a", "new"]], 0), named(&[&["a", "old"]], 0));
        assert_eq!(
            refusal(&ours, &theirs, &LoadOptions::default()),
            "load: parameters of the saved state must be named \"a\", \"new\", got none for \"new\" and a surplus \"old\"; \
             missing=\"init\" begins anew there, unexpected=\"drop\" leaves them out, rename={\"old\": \"new\"} matches them"
        );
        let matching = matched("load", &ours, &theirs, &gentle()).unwrap();
        assert_eq!((matching.initialised, matching.dropped), (vec![1], vec!["old".to_owned()]));
        let rename =
            |old: &str, new: &str| LoadOptions { rename: [(old.into(), new.into())].into(), ..LoadOptions::default() };
        let matching = matched("load", &ours, &theirs, &rename("old", "new")).unwrap();
        assert_eq!(matching.sources, BTreeMap::from([(0, 0), (1, 1)]));
        assert!(
            refusal(&ours, &theirs, &rename("x", "new"))
                .contains("of names that the saved state has (\"a\", \"old\"), got \"x\"")
        );
        assert!(
            refusal(&ours, &theirs, &rename("old", "x")).contains("to names of parameters (\"a\", \"new\"), got \"x\"")
        );
        assert!(refusal(&ours, &theirs, &rename("old", "a")).contains("must be different, got \"a\" twice"));
    }

    #[test]
    fn groups_that_are_divided_otherwise_give_no_hyperparameters() {
        let (joint, split) = (named(&[&["a", "b"]], 0), named(&[&["a"], &["b"]], 0));
        assert!(refusal(&joint, &split, &gentle()).contains("got parameters of its groups 0, 1 together in group 0"));
        assert!(
            refusal(&split, &joint, &gentle()).contains("got parameters of its group 0 in several; hparams=\"keep\"")
        );
        let keep = LoadOptions { keep_hypers: true, ..LoadOptions::default() };
        assert_eq!(matched("load", &joint, &split, &keep).unwrap().sources.len(), 2);
        let grown = named(&[&["a"], &["new"]], 0);
        assert_eq!(matched("load", &grown, &named(&[&["a"]], 0), &gentle()).unwrap().groups, [Some(0), None]);
    }

    #[test]
    fn without_names_positions_decide() {
        let ours = unnamed(named(&[&["", ""], &[""]], 0));
        let matching =
            matched("load", &ours, &unnamed(named(&[&["", ""], &[""]], 5)), &LoadOptions::default()).unwrap();
        assert_eq!(matching.sources, BTreeMap::from([(0, 5), (1, 6), (2, 7)]));
        let fewer = named(&[&["x"], &["y"]], 0);
        assert!(
            refusal(&ours, &fewer, &LoadOptions::default())
                .contains("number of parameters in group 0 must be 2, got 1")
        );
        assert!(
            refusal(&ours, &fewer[..1], &LoadOptions::default())
                .contains("number of parameter groups must be 2, got 1")
        );
        let matching = matched("load", &ours, &fewer, &gentle()).unwrap();
        assert_eq!((matching.sources, matching.initialised), (BTreeMap::from([(0, 0), (2, 1)]), vec![1]));
        let rename = LoadOptions { rename: [("x".into(), "y".into())].into(), ..gentle() };
        assert!(refusal(&ours, &fewer, &rename).contains("rename must be empty unless both sides have names"));
    }
}
