//! A panic at any part of any optimizer's step: the optimizer is torn, refuses to step or to be saved, and a load heals it.

#[path = "common/extent.rs"]
mod extent;

use std::panic::{AssertUnwindSafe, catch_unwind};

use extent::is_brief;
use roptim::closure::Ask;
use roptim::rule::Sparse;
use roptim::tensor::Rows;
use roptim::{Dtype, ErrorKind, Optimizer, Options, ParamInfo, Preset, REGISTRY, Result, TensorMut, TensorRef, drill};

/// Matrices, which every optimizer takes: of a small step, and of one for several threads.
const SIZES: [&[[usize; 2]]; 2] = [&[[5, 3], [1, 7]], &[[260, 270], [5, 3], [90, 130]]];
/// Never reached.
const FAR: usize = usize::MAX;

fn numbers(shapes: &[[usize; 2]], seed: usize) -> Vec<Vec<f32>> {
    let number = |i: usize| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0;
    shapes.iter().map(|[rows, columns]| (0..rows * columns).map(number).collect()).collect()
}

fn optimizer(preset: &Preset, shapes: &[[usize; 2]]) -> Optimizer {
    let mut optimizer = Optimizer::cpu(preset.name, &Options { threads: Some(3), ..Options::default() }).unwrap();
    let info = |shape: &[usize; 2]| ParamInfo { name: None, shape: shape.to_vec(), dtype: Dtype::F32, resident: false };
    optimizer.add_group(&[], shapes.iter().map(info).collect()).unwrap();
    optimizer
}

fn step(optimizer: &mut Optimizer, p: &mut [Vec<f32>], g: &[Vec<f32>]) -> Result<()> {
    let preset = optimizer.preset();
    let needs_rows = preset.declaration().sparse == Sparse::Required;
    let gradients: Vec<_> = g
        .iter()
        .map(|g| {
            let all = TensorRef::from(g.as_slice());
            Some(if needs_rows { all.of_rows(Rows::new((0..g.len()).collect(), 1, g.len()).unwrap()) } else { all })
        })
        .collect();
    let mut params: Vec<TensorMut<'_>> = p.iter_mut().map(|a| a.as_mut_slice().into()).collect();
    if !preset.needs_closure() {
        return optimizer.step(&mut params, &gradients);
    }
    optimizer.begin(&mut params)?;
    // A loss that falls by one from evaluation to evaluation.
    let mut loss = 0.0;
    while optimizer.tell(loss, &mut params, &gradients)? == Ask::Evaluate {
        loss -= 1.0;
    }
    Ok(())
}

#[test]
fn a_panic_at_any_part_of_any_step() {
    // The drill is the whole process's, so this is one test.
    std::panic::set_hook(Box::new(|_| {}));
    // Places in a step, at most.
    let positions = if is_brief() { 2 } else { 20 };
    let mut drills = 0;
    for (preset, shapes) in REGISTRY.iter().flat_map(|preset| SIZES.map(|shapes| (preset, shapes))) {
        let (g, mut p) = (numbers(shapes, 2), numbers(shapes, 1));
        let mut torn = optimizer(preset, shapes);
        step(&mut torn, &mut p, &g).unwrap();
        let (saved, before) = (torn.state_dict().unwrap(), p.clone());
        drill::begin(FAR, false);
        step(&mut torn, &mut p, &g).unwrap();
        let parts = FAR - drill::begin(0, false);
        let (wanted, after) = (p.clone(), torn.state_dict().unwrap());
        assert!(wanted != before && parts >= shapes.len(), "{}: {parts} parts", preset.name);
        let mut other = optimizer(preset, shapes);
        for part in (1..=parts).step_by(parts.div_ceil(positions)) {
            p.clone_from(&before);
            torn.load_state_dict(&saved).unwrap();
            drill::begin(part, false);
            let stepped = catch_unwind(AssertUnwindSafe(|| step(&mut torn, &mut p, &g)));
            assert_eq!(drill::begin(0, false), 0, "{}: part {part} of {parts}", preset.name);
            assert!(stepped.is_err() && torn.is_torn(), "{}: part {part} of {parts}", preset.name);
            drills += 1;
            let mut params: Vec<TensorMut<'_>> = p.iter_mut().map(|a| a.as_mut_slice().into()).collect();
            torn.abandon(Some(&mut params)).unwrap();
            assert!(torn.is_torn());
            if preset.needs_closure() {
                assert_eq!(p, before, "{}: part {part} of {parts}", preset.name);
            }
            let half = p.clone();
            assert_eq!(step(&mut torn, &mut p, &g).unwrap_err().kind(), ErrorKind::Torn);
            assert_eq!(torn.state_dict().unwrap_err().kind(), ErrorKind::Torn);
            assert_eq!(p, half, "who refuses writes nothing");
            step(&mut other, &mut numbers(shapes, 1), &g).unwrap();
            p.clone_from(&before);
            torn.load_state_dict(&saved).unwrap();
            step(&mut torn, &mut p, &g).unwrap();
            assert!(p == wanted && torn.state_dict().unwrap() == after, "{}: part {part} of {parts}", preset.name);
        }
    }
    let _ = std::panic::take_hook();
    assert!(drills >= positions / 2 * REGISTRY.len(), "{drills} panics");
}
