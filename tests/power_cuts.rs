//! Checkpoints where the power goes, where the disk fails, and where the names are awkward.
//!
//! The first two happen on a simulated disk, see `sim`. Every scenario returns what went wrong as a text, so that
//! the same scenario can be shown to notice a disk that skips one of its duties. Cases have numbers; the text
//! names the number, and the number gives the case again.
//!
//! `ROPTIM_FULL_TESTS=1` cuts the power a million times.

#[path = "common/extent.rs"]
mod extent;
mod sim;

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::LazyLock;

use extent::is_full;
use roptim::checkpoint::{DataType, Series, TensorData, Tree, load_from, save_to, to_bytes};
use roptim::{Error, ErrorKind};
use sim::{Every, Fault, Rng, Sabotage, SimDisk, Wrong};

/// Ends a scenario with a text unless a condition holds.
macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err(format!($($text)+));
        }
    };
}

type Outcome<T = ()> = Result<T, String>;

/// Power cuts in the normal run, all scenarios together.
const CUTS: usize = 20_000;

/// A scenario's share of all cuts, in percent.
fn share(percent: usize) -> usize {
    let all = if is_full() { 50 * CUTS } else { CUTS };
    all * percent / 100
}

/// Checkpoints to save: all different, of 1 to 11 sectors.
static CHECKPOINTS: LazyLock<Vec<Tree>> = LazyLock::new(|| (0..48).map(checkpoint).collect());

fn checkpoint(id: usize) -> Tree {
    let mut rng = Rng::new(id as u64);
    let mut tensor = |most: usize| {
        let bytes: Vec<u8> = (0..rng.below(most)).map(|_| rng.next() as u8).collect();
        Tree::Tensor(TensorData::new(DataType::UInt8, vec![bytes.len()], bytes).unwrap())
    };
    match id % 6 {
        0 => Tree::Int(id as i64),
        1 => Tree::dict([("id", Tree::Int(id as i64)), ("m", tensor(400))]),
        _ => Tree::dict([("id", Tree::Int(id as i64)), ("m", tensor(3000)), ("v", tensor(2000))]),
    }
}

fn save(disk: &SimDisk, path: &str, tree: &Tree) -> roptim::Result<()> {
    save_to(disk, path.as_ref(), tree, &mut |_, _| Ok(()))
}

fn load(disk: &SimDisk, path: &str) -> roptim::Result<Tree> {
    load_from(disk, path.as_ref(), &mut |_, _| Ok(()))
}

/// What is in a file is this checkpoint.
fn holds(disk: &SimDisk, path: &str, tree: &Tree) -> bool {
    load(disk, path).is_ok_and(|loaded| loaded == *tree)
}

fn is_absent(error: &Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<io::Error>());
    source.is_some_and(|source| source.kind() == io::ErrorKind::NotFound)
}

// ---- One file, and the power goes ----------------------------------------------------------------------

/// What stands where a file is saved.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    File,
    Nothing,
    LinkToFile,
    LinkToNothing,
}

const PLACES: [Place; 4] = [Place::File, Place::Nothing, Place::LinkToFile, Place::LinkToNothing];

const DIRECTORY: &str = "/run";
const FILE: &str = "/run/model.ckpt";
const LINK: &str = "/run/links/latest.ckpt";
const BESIDE: &str = "/run/notes.txt";

impl Place {
    /// A disk with this place, its path, and what the path holds.
    fn disk(self, old: &Tree, sabotage: Sabotage) -> (SimDisk, &'static str, Option<&Tree>) {
        let disk = SimDisk::new(sabotage, &[DIRECTORY, "/run/links"]);
        disk.put(BESIDE, b"buy milk");
        let has_file = matches!(self, Self::File | Self::LinkToFile);
        if has_file {
            disk.put(FILE, &to_bytes(old).unwrap());
        }
        let path = match self {
            Self::File | Self::Nothing => FILE,
            Self::LinkToFile | Self::LinkToNothing => {
                disk.put_link(LINK, FILE);
                LINK
            }
        };
        (disk, path, has_file.then_some(old))
    }
}

/// The path holds exactly the old checkpoint, or nothing where nothing was, or the new one; the latter alone
/// once its save has returned. What stands beside it is untouched.
fn old_or_new(disk: &SimDisk, path: &str, old: Option<&Tree>, new: &Tree, saved: bool) -> Outcome {
    match (load(disk, path), old) {
        (Ok(found), _) if found == *new => {}
        (_, _) if saved => return Err("a save that had returned is lost".into()),
        (Ok(found), Some(old)) if found == *old => {}
        (Err(error), None) if is_absent(&error) => {}
        (outcome, _) => return Err(format!("neither old nor new: {outcome:?}")),
    }
    ensure!(disk.contents(BESIDE).as_deref() == Some(b"buy milk"), "another file was touched");
    Ok(())
}

/// A save over a file, over nothing or through a link, cut anywhere.
fn one_file(case: u64, sabotage: Sabotage) -> Outcome {
    let mut rng = Rng::new(case);
    let (old, new) = (rng.below(CHECKPOINTS.len()), rng.below(CHECKPOINTS.len() - 1));
    // Never the same one.
    let (old, new) = (&CHECKPOINTS[old], &CHECKPOINTS[if new < old { new } else { new + 1 }]);
    let (disk, path, old) = rng.of(&PLACES).disk(old, sabotage);
    let leftover = rng.one_in(4);
    if leftover {
        disk.put("/run/.roptim-abcdef.tmp", &to_bytes(new).unwrap()[..64]);
    }
    let portion = rng.of(&[200, 512, 700, 4096, usize::MAX]);
    disk.portion(portion);
    let writes = 3 + to_bytes(new).unwrap().len() / portion;
    disk.cut_after(rng.below(writes + 6));
    let outcome = save(&disk, path, new);
    match &outcome {
        Ok(()) => ensure!(disk.temporaries(DIRECTORY).is_empty(), "a temporary file is left"),
        Err(error) => {
            ensure!(disk.is_off(), "the save failed by itself: {error}");
            ensure!(error.kind() == ErrorKind::Io, "{:?} where the power went", error.kind());
        }
    }
    disk.restart(&mut rng);
    old_or_new(&disk, path, old, new, outcome.is_ok())?;
    // The next save finds nothing that bothers it, and clears up.
    if rng.one_in(4) {
        let next = &CHECKPOINTS[rng.below(CHECKPOINTS.len())];
        save(&disk, path, next).map_err(|error| format!("after the restart: {error}"))?;
        ensure!(holds(&disk, path, next), "the save after the restart is not there");
        ensure!(disk.temporaries(DIRECTORY).is_empty(), "a temporary file stays after the next save");
    }
    Ok(())
}

/// Runs a scenario until this many cuts; the first violation ends it.
fn hunt(name: &str, cuts: usize, scenario: impl Fn(u64) -> Outcome<usize>) -> Outcome {
    let mut done = 0;
    for case in 0.. {
        if done >= cuts {
            break;
        }
        done += scenario(case).map_err(|what| format!("{name}, case {case}: {what}"))?;
    }
    Ok(())
}

fn hunt_one_file(cuts: usize, sabotage: Sabotage) -> Outcome {
    hunt("one file", cuts, |case| one_file(case, sabotage).map(|()| 1))
}

#[test]
fn a_cut_leaves_the_old_file_or_the_new_one() {
    hunt_one_file(share(50), Sabotage::None).unwrap();
}

/// Every fate of a small save, at every moment.
fn every_fate(sabotage: Sabotage) -> Outcome<usize> {
    /// Choices at one moment, at most.
    const MOST: usize = 1 << 12;
    let old = &checkpoint(0);
    // A file of three sectors.
    let tensor = TensorData::new(DataType::UInt8, vec![900], vec![7; 900]).unwrap();
    let new = &Tree::dict([("m", Tree::Tensor(tensor))]);
    let mut fates = 0;
    for place in PLACES {
        for cut in 0.. {
            let (disk, path, old) = place.disk(old, sabotage);
            disk.portion(sim::SECTOR);
            disk.cut_after(cut);
            let saved = save(&disk, path, new).is_ok();
            let (mut every, before) = (Every::default(), fates);
            loop {
                let left = disk.copy();
                left.restart(&mut every);
                fates += 1;
                let context = |what| format!("{place:?}, cut after {cut}, fate {}: {what}", fates - before);
                old_or_new(&left, path, old, new, saved).map_err(context)?;
                if !every.advance() {
                    break;
                }
            }
            ensure!(fates - before <= MOST, "{} fates are too many to try", fates - before);
            if saved && !disk.is_off() {
                break;
            }
        }
    }
    Ok(fates)
}

#[test]
fn every_fate_of_a_small_save_is_old_or_new() {
    let fates = every_fate(Sabotage::None).unwrap();
    assert!(fates > 1000, "only {fates} fates were tried");
}

// ---- A run, and the power goes again and again ---------------------------------------------------------

/// Checkpoints by step, as numbers of [`CHECKPOINTS`].
type Files = BTreeMap<u64, usize>;

/// What was being done when the power went.
#[derive(Debug, Clone, Copy)]
enum Doing {
    Nothing,
    Saving(u64, usize),
    DiscardingAfter(u64),
}

fn series(disk: &SimDisk, keep: usize) -> roptim::Result<Series<SimDisk>> {
    Series::open(disk.clone(), DIRECTORY, NonZeroUsize::new(keep))
}

/// What a series holds, each file looked at.
fn files_of(series: &Series<SimDisk>) -> Outcome<Files> {
    let mut files = Files::new();
    for step in series.steps().map_err(|error| error.to_string())? {
        let tree = series.load(step, &mut |_, _| Ok(())).map_err(|error| error.to_string())?;
        let number = CHECKPOINTS.iter().position(|saved| *saved == tree);
        files.insert(step, number.ok_or_else(|| format!("step {step} was never saved so"))?);
    }
    Ok(files)
}

/// The newest checkpoint as the series tells it.
fn latest_of(series: &Series<SimDisk>) -> Outcome<Option<u64>> {
    let mut damaged = Vec::new();
    let latest = series.latest(&mut |_, _| Ok(()), &mut |error| damaged.push(error.to_string()));
    ensure!(damaged.is_empty(), "damaged: {damaged:?}");
    Ok(latest.map_err(|error| error.to_string())?.map(|(step, _)| step))
}

/// One history of a run with some lives, each ended by a power cut. Returns the cuts.
fn history(case: u64, keep: usize, discards: bool, sabotage: Sabotage) -> Outcome<usize> {
    let mut rng = Rng::new(case);
    let disk = SimDisk::new(sabotage, &["/"]);
    disk.portion(rng.of(&[300, 512, 1500, usize::MAX]));
    let lives = 1 + rng.below(5);
    // What is sure to be there, and what may come back although it was removed.
    let (mut files, mut pruned) = (Files::new(), Files::new());
    let mut number = rng.below(CHECKPOINTS.len());
    for life in 0..lives {
        let context = |what: String| format!("life {life}: {what}");
        disk.cut_after(rng.below(60));
        let mut doing = Doing::Nothing;
        if let Ok(series) = series(&disk, keep) {
            for _ in 0..8 {
                let newest = files.last_key_value().map(|(&step, _)| step);
                if discards && rng.one_in(3) && !files.is_empty() {
                    // A step with a file, or one between.
                    let steps: Vec<u64> = files.keys().copied().collect();
                    let after = rng.of(&steps) + rng.below(2) as u64;
                    doing = Doing::DiscardingAfter(after);
                    let Ok(discarded) = series.discard_after(after) else { break };
                    let later: Vec<u64> = files.split_off(&(after + 1)).into_keys().rev().collect();
                    ensure!(later.iter().all(|step| discarded.contains(step)), "life {life}: {discarded:?} discarded");
                    pruned.retain(|&step, _| step <= after);
                } else {
                    let again = newest.filter(|_| rng.one_in(4));
                    let step = again.unwrap_or_else(|| newest.map_or(0, |newest| newest + 1) + rng.below(3) as u64);
                    number = (number + 1) % CHECKPOINTS.len();
                    doing = Doing::Saving(step, number);
                    let Ok(saved) = series.save(step, &CHECKPOINTS[number], &mut |_, _| Ok(())) else { break };
                    ensure!(saved.set_aside.is_empty(), "life {life}: set aside {:?}", saved.set_aside);
                    ensure!(saved.kept.is_empty() || disk.is_off(), "life {life}: kept {:?}", saved.kept);
                    // Everything before it is durable now, and what it prunes is not.
                    files.insert(step, number);
                    pruned.clear();
                    while files.len() > keep {
                        pruned.extend(files.pop_first());
                    }
                    if saved.kept.is_empty() && !disk.is_off() {
                        let steps = series.steps().map_err(|error| error.to_string())?;
                        ensure!(steps.iter().eq(files.keys()), "life {life}: steps {steps:?}, not {files:?}");
                        let left = disk.temporaries(DIRECTORY);
                        ensure!(left.is_empty(), "life {life}: {left:?} stays after a save");
                    }
                }
                doing = Doing::Nothing;
                if disk.is_off() {
                    break;
                }
            }
            ensure!(matches!(doing, Doing::Nothing) || disk.is_off(), "life {life}: {doing:?} failed by itself");
        }
        disk.restart(&mut rng);

        let series = series(&disk, keep).map_err(|error| error.to_string())?;
        let found = files_of(&series).map_err(context)?;
        let latest = latest_of(&series).map_err(context)?;
        ensure!(latest == found.last_key_value().map(|(&step, _)| step), "life {life}: latest is {latest:?}");
        for (&step, &number) in &found {
            let saved = files.get(&step) == Some(&number) || pruned.get(&step) == Some(&number);
            let saving = matches!(doing, Doing::Saving(s, n) if (s, n) == (step, number));
            ensure!(saved || saving, "life {life}: {step} is back as {number}; {doing:?}, {files:?}, {pruned:?}");
        }
        for step in files.keys() {
            let allowed = matches!(doing, Doing::DiscardingAfter(after) if *step > after);
            ensure!(found.contains_key(step) || allowed, "life {life}: {step} of {files:?} is lost; {doing:?}");
        }
        (files, pruned) = (found, Files::new());
    }
    // And without any cut.
    let series = series(&disk, keep).map_err(|error| error.to_string())?;
    let step = files.last_key_value().map_or(0, |(&step, _)| step + 1);
    series.save(step, &CHECKPOINTS[0], &mut |_, _| Ok(())).map_err(|error| format!("at last: {error}"))?;
    ensure!(latest_of(&series)? == Some(step), "at last: not the newest");
    ensure!(files_of(&series)?.len() == (files.len() + 1).min(keep), "at last: {:?}", files_of(&series)?);
    ensure!(disk.temporaries(DIRECTORY).is_empty(), "at last: a temporary file stays");
    Ok(lives)
}

fn hunt_series(cuts: usize, sabotage: Sabotage) -> Outcome {
    hunt("series", cuts, |case| history(case, 2, false, sabotage))
}

fn hunt_discards(cuts: usize, sabotage: Sabotage) -> Outcome {
    hunt("series with discards", cuts, |case| history(case, 4, true, sabotage))
}

#[test]
fn a_run_goes_on_from_its_last_checkpoint() {
    hunt_series(share(30), Sabotage::None).unwrap();
}

#[test]
fn what_was_discarded_stays_discarded() {
    hunt_discards(share(20), Sabotage::None).unwrap();
}

/// A run that went back behind a damaged checkpoint: every fate, at every moment, of the save that takes its place.
fn beside_damage(sabotage: Sabotage) -> Outcome<usize> {
    let mut fates = 0;
    for cut in 0.. {
        let disk = SimDisk::new(sabotage, &[DIRECTORY]);
        let series = series(&disk, 2).map_err(|error| error.to_string())?;
        disk.put("/run/step-00000010.safetensors", &to_bytes(&CHECKPOINTS[0]).unwrap());
        disk.put("/run/step-00000020.safetensors", b"damaged");
        disk.cut_after(cut);
        let saved = series.save(15, &CHECKPOINTS[6], &mut |_, _| Ok(())).is_ok();
        let mut every = Every::default();
        loop {
            let left = disk.copy();
            left.restart(&mut every);
            let series = self::series(&left, 2).map_err(|error| error.to_string())?;
            let mut damaged = Vec::new();
            let latest = series.latest(&mut |_, _| Ok(()), &mut |error| damaged.push(error.to_string()));
            match latest.map_err(|error| error.to_string())? {
                Some((15, tree)) => ensure!(tree == CHECKPOINTS[6], "cut after {cut}: another tree"),
                Some((10, tree)) => ensure!(tree == CHECKPOINTS[0] && !saved, "cut after {cut}: the save is lost"),
                other => return Err(format!("cut after {cut}: {other:?}")),
            }
            let known = damaged.iter().all(|error| error.contains("step-00000020") && !saved);
            ensure!(known, "cut after {cut}: damaged {damaged:?}");
            let names = ["/run/step-00000020.safetensors", "/run/step-00000020.safetensors.damaged"];
            let kept = names.iter().filter(|path| left.contents(path).is_some()).count();
            ensure!(kept == 1, "cut after {cut}: the damaged one is there {kept} times");
            fates += 1;
            if !every.advance() {
                break;
            }
        }
        if saved && !disk.is_off() {
            return Ok(fates);
        }
    }
    unreachable!("the save ends")
}

#[test]
fn a_run_goes_back_behind_a_damaged_checkpoint() {
    let fates = beside_damage(Sabotage::None).unwrap();
    assert!(fates > 20, "only {fates} fates were tried");
}

// ---- The disk fails ------------------------------------------------------------------------------------

const WRONGS: [Wrong; 9] = [
    Wrong::Error(io::ErrorKind::StorageFull),
    Wrong::Error(io::ErrorKind::QuotaExceeded),
    Wrong::Error(io::ErrorKind::ReadOnlyFilesystem),
    Wrong::Error(io::ErrorKind::PermissionDenied),
    Wrong::Error(io::ErrorKind::TimedOut),
    Wrong::Error(io::ErrorKind::Interrupted),
    Wrong::Device,
    Wrong::Short,
    Wrong::Nothing,
];

/// How many operations in a row go wrong: one, a few, or all from there.
const LASTING: [usize; 3] = [1, 3, usize::MAX];

/// Calls with every way to fail from every operation on, of which `probe` uses as many as it returns.
fn every_fault(probe: impl Fn(Fault) -> Outcome<usize>) -> Outcome<usize> {
    let mut cases = 0;
    for wrong in WRONGS {
        for lasting in LASTING {
            // What is always interrupted or moves nothing for ever never ends, or is the same as once.
            if lasting == usize::MAX && wrong == Wrong::Error(io::ErrorKind::Interrupted) {
                continue;
            }
            for from in 0.. {
                let fault = Fault { wrong, from, until: from.saturating_add(lasting) };
                let operations = probe(fault).map_err(|what| format!("{fault:?}: {what}"))?;
                cases += 1;
                if from > operations {
                    break;
                }
            }
        }
    }
    Ok(cases)
}

/// Calls that give what they ought to whatever goes wrong in them: an error there harms nobody.
const OPTIONAL: [&str; 2] = ["list", "remove_abandoned"];

/// What must fail the call, of the operations that went wrong.
fn fatal<'f>(wrong: Wrong, failed: &[&'f str], optional: &[&str]) -> Option<&'f str> {
    let matters = |name: &&&str| match wrong {
        Wrong::Short | Wrong::Error(io::ErrorKind::Interrupted) => false,
        Wrong::Nothing => matches!(**name, "write" | "read"),
        _ => !optional.contains(*name),
    };
    failed.iter().find(matters).copied()
}

fn faulty_save(place: Place, portion: usize, fault: Fault, sabotage: Sabotage) -> Outcome<usize> {
    let (old, new, next) = (&CHECKPOINTS[2], &CHECKPOINTS[3], &CHECKPOINTS[4]);
    let (disk, path, old) = place.disk(old, sabotage);
    disk.put("/run/.roptim-abcdef.tmp", b"left by a crash");
    disk.portion(portion);
    disk.fail(fault);
    let outcome = save(&disk, path, new);
    let operations = disk.operations();
    let failed = disk.heal();
    match (&outcome, fatal(fault.wrong, &failed, &OPTIONAL)) {
        (Ok(()), None) => ensure!(holds(&disk, path, new), "it said that it saved"),
        (Ok(()), Some(operation)) => return Err(format!("{operation} failed, and it said that it saved")),
        (Err(error), None) => return Err(format!("it need not have failed: {error}")),
        (Err(error), Some(operation)) => {
            ensure!(error.kind() == ErrorKind::Io, "{:?}: {error}", error.kind());
            ensure!(error.to_string().starts_with(&format!("{path}: ")), "the path is not named: {error}");
            ensure!(std::error::Error::source(error).is_some(), "no cause: {error}");
            if operation == "sync_directory" {
                ensure!(error.to_string().contains("the file is in place"), "{error}");
                ensure!(holds(&disk, path, new), "it said that the file is in place");
            } else {
                match old {
                    Some(old) => ensure!(holds(&disk, path, old), "{operation} failed, and the old file is lost"),
                    None => ensure!(disk.contents(FILE).is_none(), "{operation} failed, and a file is there"),
                }
            }
        }
    }
    if !failed.iter().any(|name| ["remove", "remove_abandoned", "list"].contains(name)) {
        let left = disk.temporaries(DIRECTORY);
        // Before the sweep nothing is swept.
        let swept = operations > 0 && !left.contains(&".roptim-abcdef.tmp".to_owned());
        ensure!(left.is_empty() || !swept && left.len() == 1, "{left:?} is left");
    }
    if let Some(misuse) = disk.misuse() {
        return Err(misuse);
    }
    save(&disk, path, next).map_err(|error| format!("the next save: {error}"))?;
    ensure!(holds(&disk, path, next), "the next save is not there");
    ensure!(disk.temporaries(DIRECTORY).is_empty(), "a temporary file stays after the next save");
    Ok(operations)
}

fn faulty_saves(sabotage: Sabotage) -> Outcome<usize> {
    let mut cases = 0;
    for place in PLACES {
        for portion in [128, usize::MAX] {
            cases += every_fault(|fault| faulty_save(place, portion, fault, sabotage))?;
        }
    }
    Ok(cases)
}

#[test]
fn a_save_that_fails_anywhere_leaves_the_old_file() {
    let cases = faulty_saves(Sabotage::None).unwrap();
    assert!(cases > 1000, "only {cases} cases");
}

fn faulty_load(portion: usize, fault: Fault) -> Outcome<usize> {
    let (disk, path, tree) = Place::LinkToFile.disk(&CHECKPOINTS[3], Sabotage::None);
    disk.portion(portion);
    disk.fail(fault);
    let outcome = load(&disk, path);
    let operations = disk.operations();
    match (outcome, fatal(fault.wrong, &disk.heal(), &[])) {
        (Ok(loaded), None) => ensure!(Some(&loaded) == tree, "another tree was loaded"),
        // At the end of the file there is nothing to read anyway.
        (Ok(loaded), Some(_)) => ensure!(Some(&loaded) == tree && fault.wrong == Wrong::Nothing, "it said it loaded"),
        (Err(error), None) => return Err(format!("it need not have failed: {error}")),
        (Err(error), Some(_)) => {
            // A file that ends early is damaged.
            let kind = if fault.wrong == Wrong::Nothing { ErrorKind::File } else { ErrorKind::Io };
            ensure!(error.kind() == kind, "{:?}: {error}", error.kind());
            ensure!(error.to_string().starts_with(&format!("{path}: ")), "the path is not named: {error}");
        }
    }
    ensure!(load(&disk, path).is_ok_and(|loaded| Some(&loaded) == tree), "the file cannot be loaded any more");
    Ok(operations)
}

#[test]
fn a_load_that_fails_anywhere_says_so() {
    let cases: usize =
        [100, usize::MAX].map(|portion| every_fault(|fault| faulty_load(portion, fault)).unwrap()).iter().sum();
    assert!(cases > 500, "only {cases} cases");
}

/// A series with the checkpoints 1 and 2 at the steps 10 and 20, of which it keeps both.
fn short_series() -> (SimDisk, Series<SimDisk>) {
    let disk = SimDisk::new(Sabotage::None, &["/"]);
    let series = series(&disk, 2).unwrap();
    for (step, number) in [(10, 1), (20, 2)] {
        series.save(step, &CHECKPOINTS[number], &mut |_, _| Ok(())).unwrap();
    }
    (disk, series)
}

fn names_a_path(error: &Error) -> Outcome {
    ensure!(error.kind() == ErrorKind::Io, "{:?}: {error}", error.kind());
    ensure!(error.to_string().starts_with(DIRECTORY), "the path is not named: {error}");
    Ok(())
}

fn faulty_series_save(step: u64, fault: Fault) -> Outcome<usize> {
    let (disk, series) = short_series();
    disk.fail(fault);
    let outcome = series.save(step, &CHECKPOINTS[3], &mut |_, _| Ok(()));
    let operations = disk.operations();
    let failed = disk.heal();
    let (old, new) = (Files::from([(10, 1), (20, 2)]), files_of(&series)?);
    match outcome {
        Ok(saved) => {
            let mut expected = old.clone();
            expected.insert(step, 3);
            let pruned = expected.len() > 2 && saved.kept.is_empty();
            if pruned {
                expected.pop_first();
            }
            ensure!(new == expected, "it said that it saved, and there is {new:?}");
            ensure!(saved.set_aside.is_empty(), "set aside {:?}", saved.set_aside);
            saved.kept.iter().try_for_each(names_a_path)?;
        }
        Err(error) => {
            names_a_path(&error)?;
            let in_place = failed.contains(&"sync_directory") && error.to_string().contains("in place");
            ensure!(new == old || in_place, "it failed ({error}), and there is {new:?}");
        }
    }
    if let Some(misuse) = disk.misuse() {
        return Err(misuse);
    }
    series.save(30, &CHECKPOINTS[4], &mut |_, _| Ok(())).map_err(|error| format!("the next save: {error}"))?;
    ensure!(latest_of(&series)? == Some(30), "the next save is not the newest");
    ensure!(disk.temporaries(DIRECTORY).is_empty(), "a temporary file stays after the next save");
    ensure!(files_of(&series)?.len() == 2, "{:?} after the next save", files_of(&series)?);
    Ok(operations)
}

fn faulty_latest(fault: Fault) -> Outcome<usize> {
    let (disk, series) = short_series();
    disk.fail(fault);
    let mut damaged = Vec::new();
    let outcome = series.latest(&mut |_, _| Ok(()), &mut |error| damaged.push(error));
    let operations = disk.operations();
    let may_fail = fatal(fault.wrong, &disk.heal(), &[]).is_some();
    match outcome {
        Ok(Some((20, tree))) => ensure!(tree == CHECKPOINTS[2] && damaged.is_empty(), "{damaged:?}"),
        Ok(Some((10, tree))) => ensure!(tree == CHECKPOINTS[1] && damaged.len() == 1 && may_fail, "{damaged:?}"),
        Ok(other) => return Err(format!("{other:?}")),
        Err(error) => {
            ensure!(may_fail, "it need not have failed: {error}");
            ensure!(error.to_string().starts_with(DIRECTORY), "the path is not named: {error}");
        }
    }
    Ok(operations)
}

fn faulty_discard(fault: Fault) -> Outcome<usize> {
    let (disk, series) = short_series();
    disk.fail(fault);
    let outcome = series.discard_after(10);
    let operations = disk.operations();
    let may_fail = fatal(fault.wrong, &disk.heal(), &[]).is_some();
    let left = files_of(&series)?;
    ensure!(left.get(&10) == Some(&1), "{left:?} is left");
    match outcome {
        Ok(discarded) => ensure!(discarded == [20] && left.len() == 1 && !may_fail, "{discarded:?}, {left:?}"),
        Err(error) => {
            ensure!(may_fail, "it need not have failed: {error}");
            names_a_path(&error)?;
        }
    }
    Ok(operations)
}

fn faulty_open(fault: Fault) -> Outcome<usize> {
    let disk = SimDisk::new(Sabotage::None, &["/"]);
    disk.fail(fault);
    let outcome = series(&disk, 2);
    let operations = disk.operations();
    match (outcome, fatal(fault.wrong, &disk.heal(), &[])) {
        (Ok(series), None) => ensure!(latest_of(&series)?.is_none(), "not empty"),
        (Err(error), Some(_)) => names_a_path(&error)?,
        (outcome, failed) => return Err(format!("{outcome:?} although {failed:?} failed")),
    }
    Ok(operations)
}

#[test]
fn a_series_that_fails_anywhere_keeps_what_it_has() {
    let mut cases = 0;
    // A later step, and the newest one again.
    for step in [25, 20] {
        cases += every_fault(|fault| faulty_series_save(step, fault)).unwrap();
    }
    cases += every_fault(faulty_latest).unwrap();
    cases += every_fault(faulty_discard).unwrap();
    cases += every_fault(faulty_open).unwrap();
    assert!(cases > 1000, "only {cases} cases");
}

/// A report of progress that fails or panics is an error like any other.
#[test]
fn a_report_that_fails_leaves_the_old_file() {
    for place in PLACES {
        for panics in [false, true] {
            let (disk, path, old) = place.disk(&CHECKPOINTS[2], Sabotage::None);
            let mut report = |_, _| {
                if panics {
                    std::panic::resume_unwind(Box::new("a report that panics"));
                }
                Err(Error::plain(ErrorKind::Internal, "a report that fails"))
            };
            let save = || save_to(&disk, path.as_ref(), &CHECKPOINTS[3], &mut report);
            match catch_unwind(AssertUnwindSafe(save)) {
                Ok(outcome) => assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Internal),
                Err(_) => assert!(panics),
            }
            assert_eq!(load(&disk, path).ok().as_ref(), old);
            assert!(disk.temporaries(DIRECTORY).is_empty());
        }
    }
}

// ---- These tests can fail ------------------------------------------------------------------------------

/// Each duty of a disk that a save relies on, skipped: some scenario finds out.
#[test]
fn a_disk_that_skips_a_duty_is_noticed() {
    const CUTS: usize = 5000;
    let found = |outcome: Outcome, who: &str, sabotage| {
        outcome.expect_err(&format!("{who}: {sabotage:?} was not noticed"));
    };
    use Sabotage::*;
    for sabotage in [NoSync, NoDirectorySync, SyncAfterRename, InPlace(FILE), RenameInTwo, NoSweep] {
        found(hunt_one_file(CUTS, sabotage), "one file", sabotage);
    }
    for sabotage in [NoSync, NoDirectorySync, SyncAfterRename, InPlace(FILE), RenameInTwo] {
        found(every_fate(sabotage).map(drop), "every fate", sabotage);
    }
    for sabotage in [NoSync, NoDirectorySync, SyncAfterRename] {
        found(beside_damage(sabotage).map(drop), "beside damage", sabotage);
    }
    for sabotage in [NoSync, NoDirectorySync, SyncAfterRename, RenameInTwo, NoSweep, NoRemoval] {
        found(hunt_series(CUTS, sabotage), "series", sabotage);
        found(hunt_discards(CUTS, sabotage), "discards", sabotage);
    }
    for sabotage in [NoWriteErrors, NoShortWrites, NoRemoval, NoSweep] {
        found(faulty_saves(sabotage).map(drop), "faults", sabotage);
    }
}

// ---- The real disk -------------------------------------------------------------------------------------

#[cfg(unix)]
mod real {
    use std::fs::{self, File};
    use std::os::unix::fs::{FileTypeExt as _, symlink};
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;
    use std::process::Command;
    use std::sync::mpsc;
    use std::time::Duration;

    use roptim::checkpoint::{OsDisk, load, save};

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = entries.map(|name| name.to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    fn make_pipe(path: &Path) {
        assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    }

    /// Fails instead of waiting for ever, as opening a pipe would.
    fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || sender.send(work()));
        receiver.recv_timeout(Duration::from_secs(60)).expect("it waits, or it panicked")
    }

    #[test]
    fn leftovers_of_the_dead_are_removed_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let here = |name: &str| directory.path().join(name);
        fs::write(here("elsewhere"), "keep").unwrap();
        fs::write(here(".roptim-dead.tmp"), "half a file").unwrap();
        fs::write(here(".roptim-alive.tmp"), "half a file").unwrap();
        let alive = File::open(here(".roptim-alive.tmp")).unwrap();
        alive.lock().unwrap();
        fs::create_dir(here(".roptim-directory.tmp")).unwrap();
        fs::write(here(".roptim-directory.tmp/inner"), "keep").unwrap();
        symlink("elsewhere", here(".roptim-link.tmp")).unwrap();
        symlink("nowhere", here(".roptim-loose.tmp")).unwrap();
        make_pipe(&here(".roptim-pipe.tmp"));
        let _socket = UnixListener::bind(here(".roptim-socket.tmp")).unwrap();
        for other in ["roptim-a.tmp", ".roptim-a.tmp2", ".roptim-a", ".tmp"] {
            fs::write(here(other), "keep").unwrap();
        }
        let mut expected = names(directory.path());
        expected.retain(|name| name != ".roptim-dead.tmp");
        expected.push("model.ckpt".into());
        expected.sort();

        let path = here("model.ckpt");
        in_time(move || save(path, &CHECKPOINTS[1]).unwrap());
        assert_eq!(names(directory.path()), expected);
        assert_eq!(fs::read(here("elsewhere")).unwrap(), b"keep");

        drop(alive);
        save(here("other.ckpt"), &CHECKPOINTS[1]).unwrap();
        expected.retain(|name| name != ".roptim-alive.tmp");
        expected.push("other.ckpt".into());
        expected.sort();
        assert_eq!(names(directory.path()), expected);
    }

    #[test]
    fn many_saves_into_one_directory_all_succeed() {
        const THREADS: usize = 24;
        const SAVES: usize = 25;
        let directory = tempfile::tempdir().unwrap();
        let here = |name: String| directory.path().join(name);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                scope.spawn(move || {
                    for round in 0..SAVES {
                        let tree = &CHECKPOINTS[(thread + round) % CHECKPOINTS.len()];
                        save(here(format!("{thread}.ckpt")), tree).unwrap();
                        assert_eq!(load(here(format!("{thread}.ckpt"))).unwrap(), *tree);
                        // One name that all of them want: somebody's checkpoint is whole at any time.
                        save(here("all.ckpt".into()), tree).unwrap();
                        assert!(CHECKPOINTS.contains(&load(here("all.ckpt".into())).unwrap()));
                    }
                });
            }
        });
        let mut expected: Vec<_> = (0..THREADS).map(|thread| format!("{thread}.ckpt")).collect();
        expected.push("all.ckpt".into());
        expected.sort();
        assert_eq!(names(directory.path()), expected);
    }

    /// Everything under a directory, with what it is.
    fn everything(directory: &Path) -> Vec<(PathBuf, String)> {
        let mut found = Vec::new();
        let mut open = vec![directory.to_owned()];
        while let Some(folder) = open.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let kind = fs::symlink_metadata(&path).unwrap().file_type();
                let held = if kind.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
                if kind.is_dir() {
                    open.push(path.clone());
                }
                found.push((path, format!("{kind:?} {held:?}")));
            }
        }
        found.sort();
        found
    }

    #[test]
    fn no_path_makes_a_save_do_harm() {
        let directory = tempfile::tempdir().unwrap();
        let here = |name: &str| directory.path().join(name);
        fs::write(here("file"), "x").unwrap();
        fs::write(here(".roptim-mine.tmp"), "x").unwrap();
        // Held, so that what saves sweep is not in the way.
        let held = File::open(here(".roptim-mine.tmp")).unwrap();
        held.lock().unwrap();
        fs::create_dir(here("directory")).unwrap();
        symlink("ring-b", here("ring-a")).unwrap();
        symlink("ring-a", here("ring-b")).unwrap();
        symlink("directory", here("to-directory")).unwrap();
        symlink("missing/x", here("to-missing")).unwrap();
        symlink("/dev/null", here("to-device")).unwrap();
        symlink("nowhere", here("to-nowhere")).unwrap();
        symlink(".roptim-mine.tmp", here("to-temporary")).unwrap();
        symlink("0", here("chain-41")).unwrap();
        (0..41).for_each(|i| symlink(format!("{}", i + 1), here(&format!("{i}"))).unwrap());
        make_pipe(&here("pipe"));
        let _socket = UnixListener::bind(here("socket")).unwrap();

        let text = |name: &str| format!("{}/{name}", directory.path().display());
        let (not_regular, not_found) = ("must be a regular file or absent", "No such file or directory");
        let mut cases = vec![
            (text("directory"), not_regular),
            (text("directory/"), not_regular),
            (text("directory/."), not_regular),
            (text("directory/.."), not_regular),
            (text("."), not_regular),
            (text(".."), not_regular),
            (".".to_owned(), not_regular),
            ("..".to_owned(), not_regular),
            ("/".to_owned(), not_regular),
            (text("to-directory"), not_regular),
            (text("to-directory/"), not_regular),
            (text("pipe"), not_regular),
            (text("socket"), not_regular),
            ("/dev/null".to_owned(), not_regular),
            (text("to-device"), not_regular),
            (String::new(), not_found),
            (text("ring-a"), "too many symbolic links"),
            (text("chain-41"), "too many symbolic links"),
            (text("ring-a/x"), "Too many levels of symbolic links"),
            (text("missing/x"), not_found),
            (text("to-missing"), not_found),
            (text("file/x"), "Not a directory"),
            (text("file/"), "Not a directory"),
            (text("file/."), "Not a directory"),
            (text("new/"), "could not be renamed"),
            (text("to-nowhere/"), "could not be renamed"),
            (text("new/."), "could not be"),
            (text("new/.."), "could not be"),
            (text(&"n".repeat(256)), "File name too long"),
            (text(&"n/".repeat(4096)), "File name too long"),
            (text("nul\0byte"), "NUL byte"),
            (text(".roptim-mine.tmp"), "must be named other than"),
            (text(".roptim-new.tmp"), "must be named other than"),
            (text("to-temporary"), "must be named other than"),
        ];
        if cfg!(target_os = "linux") {
            // A file system without files that can be made.
            cases.push(("/proc/self/model.ckpt".into(), "could not be made"));
        }
        let before = everything(directory.path());
        let count = cases.len();
        for (path, part) in cases {
            let (copy, shown) = (PathBuf::from(&path), Path::new(&path).display().to_string());
            let error = in_time(move || save(copy, &CHECKPOINTS[1])).expect_err(&shown);
            assert_eq!(error.kind(), ErrorKind::Io, "{error}");
            let shown = shown.replace('\0', "\\u{0}");
            assert!(error.to_string().starts_with(&format!("{shown}: ")), "{error}");
            assert!(error.to_string().contains(part), "want {part:?}, got {error}");
            assert!(everything(directory.path()) == before, "a save to {path:?} did something");
            // And none of them is something to load.
            let loaded = in_time(move || load(path));
            assert!(matches!(loaded.unwrap_err().kind(), ErrorKind::Io | ErrorKind::File));
        }
        assert!(names(Path::new(".")).iter().all(|name| !name.starts_with(".roptim-")));
        assert!(count >= 30);
    }

    #[test]
    fn awkward_names_are_names() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("real")).unwrap();
        symlink("real", directory.path().join("link")).unwrap();
        let long = "n".repeat(255);
        let plain = ["a\nb", "a b", "-rf", "é\u{202e}", "*", "~", "a\\b", "...", ".roptim-", "roptim.tmp", &long];
        for name in plain.into_iter().chain(["link/x", "real/../y", "./z", "real//w"]) {
            let path = directory.path().join(name);
            for tree in [&CHECKPOINTS[1], &CHECKPOINTS[2]] {
                save(&path, tree).unwrap();
                assert_eq!(load(&path).unwrap(), *tree, "{name:?}");
            }
        }
        let mut expected: Vec<_> = plain.into_iter().chain(["link", "real", "y", "z"]).collect();
        expected.sort_unstable();
        assert_eq!(names(directory.path()), expected);
        assert_eq!(names(&directory.path().join("real")), ["w", "x"]);
    }

    #[test]
    fn a_read_only_directory_is_left_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.ckpt");
        save(&path, &CHECKPOINTS[1]).unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o555)).unwrap();
        // Nothing is read-only to root.
        if fs::write(directory.path().join("probe"), "x").is_err() {
            let error = save(&path, &CHECKPOINTS[2]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io);
            assert!(error.to_string().contains("model.ckpt: a temporary file could not be made beside it"), "{error}");
            assert_eq!(load(&path).unwrap(), CHECKPOINTS[1]);
            assert_eq!(names(directory.path()), ["model.ckpt"]);
        }
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A file that nobody may write is replaced all the same, and what a crash leaves of that is removed.
    #[test]
    fn a_read_only_file_is_replaced() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        for name in ["model.ckpt", ".roptim-dead.tmp"] {
            fs::write(directory.path().join(name), "x").unwrap();
            fs::set_permissions(directory.path().join(name), fs::Permissions::from_mode(0o444)).unwrap();
        }
        let path = directory.path().join("model.ckpt");
        save(&path, &CHECKPOINTS[1]).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o444);
        assert_eq!(names(directory.path()), ["model.ckpt"]);
    }

    #[test]
    fn directories_that_cannot_be_made_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("file"), "x").unwrap();
        symlink("nowhere", directory.path().join("loose")).unwrap();
        make_pipe(&directory.path().join("pipe"));
        let before = everything(directory.path());
        for name in ["file", "file/run", "loose", "loose/run", "pipe", "pipe/run", "nul\0byte"] {
            let path = directory.path().join(name);
            let error = in_time(move || Series::open(OsDisk, path, None)).expect_err(name);
            assert_eq!(error.kind(), ErrorKind::Io, "{error}");
            assert!(error.to_string().contains("the directory could not be made"), "{error}");
        }
        assert_eq!(in_time(|| Series::open(OsDisk, "", None)).unwrap_err().kind(), ErrorKind::Io);
        assert!(everything(directory.path()) == before);
        let path = directory.path().join("a/b/../c");
        Series::open(OsDisk, &path, None).unwrap().save(1, &CHECKPOINTS[1], &mut |_, _| Ok(())).unwrap();
        assert_eq!(names(&path), ["step-00000001.safetensors"]);
    }

    /// What has the name of a checkpoint and is none: neither lost, nor followed, nor waited for.
    #[test]
    fn a_series_of_strange_things_is_damaged() {
        let directory = tempfile::tempdir().unwrap();
        let here = directory.path().to_owned();
        let series = || Series::open(OsDisk, directory.path(), NonZeroUsize::new(1)).unwrap();
        symlink("nowhere", series().path(2)).unwrap();
        fs::create_dir(series().path(3)).unwrap();
        make_pipe(&series().path(4));
        fs::write(series().path(5), "x").unwrap();
        let latest = move || {
            let mut damaged = 0;
            let series = Series::open(OsDisk, here.clone(), None).unwrap();
            let latest = series.latest(&mut |_, _| Ok(()), &mut |_| damaged += 1);
            (latest.map(|found| found.map(|(step, _)| step)).map_err(|error| error.kind()), damaged)
        };
        assert_eq!(in_time(latest.clone()), (Err(ErrorKind::File), 3), "only what can be found at first");
        for step in [3, 4, 5] {
            let path = series().path(step);
            if path.is_dir() { fs::remove_dir(path).unwrap() } else { fs::remove_file(path).unwrap() }
        }
        assert_eq!(in_time(latest.clone()), (Err(ErrorKind::File), 1));

        make_pipe(&series().path(4));
        let copy = directory.path().to_owned();
        let saved = in_time(move || {
            let series = Series::open(OsDisk, copy, NonZeroUsize::new(1)).unwrap();
            series.save(3, &CHECKPOINTS[1], &mut |_, _| Ok(())).unwrap()
        });
        let aside = directory.path().join("step-00000004.safetensors.damaged");
        assert_eq!(saved.set_aside, std::slice::from_ref(&aside));
        assert!(fs::symlink_metadata(aside).unwrap().file_type().is_fifo());
        assert_eq!(in_time(latest), (Ok(Some(3)), 0));
    }
}
