use std::collections::BTreeMap;

use proptest::prelude::*;

use super::descent::{Descent, Method, Settings};
use super::lbfgs::{self, History, Options};
use super::parts::{Part, Parts};
use super::vector::{HostVector, Vector};
use super::wolfe::{Rules, Search, Trial};
use super::{Ask, ConjugateGradient, Lbfgs, Machine};
use crate::isa::{Isa, Loops};
use crate::linear;
use crate::real::Real;

type Host<F> = HostVector<F>;

const SERIAL: Loops = Loops { isa: Isa::Baseline, parallel: false };

fn largest<F: Real>(x: &[F]) -> f64 {
    linear::largest(SERIAL, x)
}

/// Loss at a point; the gradient goes into the second argument.
type Function = fn(&[f64], &mut [f64]) -> f64;

fn rosenbrock(x: &[f64], g: &mut [f64]) -> f64 {
    g.fill(0.0);
    let mut loss = 0.0;
    for i in 1..x.len() {
        let (valley, slope) = (x[i] - x[i - 1] * x[i - 1], 1.0 - x[i - 1]);
        loss += 100.0 * valley * valley + slope * slope;
        g[i - 1] -= 400.0 * x[i - 1] * valley + 2.0 * slope;
        g[i] += 200.0 * valley;
    }
    loss
}

/// Condition number 1e6, minimum at 1.
fn quadratic(x: &[f64], g: &mut [f64]) -> f64 {
    let mut loss = 0.0;
    for (i, (x, g)) in x.iter().zip(g).enumerate() {
        let weight = libm::pow(1e6, i as f64 / 49.0);
        *g = weight * (x - 1.0);
        loss += 0.5 * *g * (x - 1.0);
    }
    loss
}

/// Rosenbrock's function with nothing but NaN beyond x₀ = 0.5.
fn nan_wall(x: &[f64], g: &mut [f64]) -> f64 {
    if x[0] > 0.5 {
        g.fill(f64::NAN);
        return f64::NAN;
    }
    rosenbrock(x, g)
}

/// −Σ log xᵢ + Σ xᵢ², infinite from 0 down.
fn barrier(x: &[f64], g: &mut [f64]) -> f64 {
    x.iter().zip(g).fold(0.0, |loss, (&x, g)| {
        *g = 2.0 * x - 1.0 / x;
        loss + if x > 0.0 { x * x - libm::log(x) } else { f64::INFINITY }
    })
}

/// Falls forever.
fn ramp(x: &[f64], g: &mut [f64]) -> f64 {
    g.fill(-1.0);
    -x.iter().sum::<f64>()
}

/// Overflows a little way off.
fn steep(x: &[f64], g: &mut [f64]) -> f64 {
    x.iter().zip(g).fold(0.0, |loss, (&x, g)| {
        let exp = libm::exp(x * x);
        *g = 2.0 * x * exp;
        loss + exp
    })
}

/// A kink at its minimum.
fn kink(x: &[f64], g: &mut [f64]) -> f64 {
    x.iter().zip(g).fold(0.0, |loss, (&x, g)| {
        *g = if x < 0.1 { -1.0 } else { 1.0 };
        loss + (x - 0.1).abs()
    })
}

/// A gradient that points the wrong way, and one that is sometimes infinite.
fn liar(x: &[f64], g: &mut [f64]) -> f64 {
    let loss = rosenbrock(x, g);
    g.iter_mut().for_each(|g| *g = -*g);
    if loss > 50.0 {
        g[0] = f64::INFINITY;
    }
    loss
}

const FUNCTIONS: &[Function] = &[rosenbrock, quadratic, nan_wall, barrier, ramp, steep, kink, liar];

/// One step; all points that were evaluated.
fn step<F: Real, M: Method<Host<F>>>(
    machine: &mut Descent<Host<F>, M>,
    settings: &Settings<M::Options>,
    x: &[F],
    mut f: impl FnMut(&[F], &mut [F]) -> f64,
) -> Vec<Vec<F>> {
    machine.begin(settings, x.to_vec()).unwrap();
    let mut points = Vec::new();
    let mut g = vec![F::ZERO; x.len()];
    loop {
        points.push(machine.point().to_vec());
        let loss = f(machine.point(), &mut g);
        if machine.tell(loss, &g[..]) == Ask::Done {
            return points;
        }
    }
}

fn loss(f: Function, x: &[f64]) -> f64 {
    f(x, &mut vec![0.0; x.len()])
}

fn start(n: usize) -> Vec<f64> {
    [-1.2, 1.0].into_iter().cycle().take(n).collect()
}

fn patient<O: Default>() -> Settings<O> {
    let tolerances = Settings { tolerance_grad: 1e-9, tolerance_change: 0.0, ..Settings::default() };
    Settings { max_iter: 10_000, max_eval: 20_000, ..tolerances }
}

fn searching() -> Settings<Options> {
    Settings { method: Options { strong_wolfe: true, ..Options::default() }, ..patient() }
}

fn distance_to_one(x: &[f64]) -> f64 {
    x.iter().map(|x| (x - 1.0).abs()).fold(0.0, f64::max)
}

#[test]
fn sums_equal_the_plain_ones_and_see_nan() {
    for n in 0..40 {
        let x: Host<f64> = (0..n).map(|i| f64::from(i) - 17.0).collect();
        assert_eq!(x.dot(&x), x.iter().map(|x| x * x).sum::<f64>());
        assert_eq!(x.sum_abs(), x.iter().map(|x| x.abs()).sum::<f64>());
        assert_eq!(x.largest(), x.iter().map(|x| x.abs()).fold(0.0, f64::max));
        for i in 0..x.len() {
            let mut x = x.to_vec();
            x[i] = f64::NAN;
            let x = Host::from(x);
            assert!(x.largest().is_nan() && x.dot(&x).is_nan());
        }
    }
}

/// Points and counts of torch's recipe, written again in NumPy from its description.
#[test]
fn lbfgs_asks_where_torch_does() {
    let one_call = Settings { max_iter: 100, max_eval: 125, ..Settings::default() };
    let wolfe = Settings { method: searching().method, ..one_call };
    let plain = Settings { lr: 0.1, ..one_call };
    let wolfe_points = [
        [-1.2, 1.0],
        [-0.489855072463768, 1.289855072463768],
        [-1.0245319303460325, 1.0716196202669255],
        [-1.0284565745562346, 1.068187455748677],
        [-1.0288795348319695, 1.0655029516848564],
        [-1.0276177663827242, 1.0584120782656612],
        [-1.0203084803940978, 1.035276986646747],
        [-0.9970310351680051, 0.9755913846740072],
    ];
    let plain_points = [
        [-1.2, 1.0],
        [-1.1289855072463768, 1.0289855072463767],
        [-1.1208360338970624, 1.0326372109383015],
        [-1.1128546149688603, 1.0363447882087733],
        [-1.1055651417532057, 1.0398185126407882],
    ];
    for (settings, want, evals, iterations) in
        [(wolfe, &wolfe_points[..], 43, 35), (plain, &plain_points[..], 100, 100)]
    {
        let mut machine = Lbfgs::default();
        let points = step(&mut machine, &settings, &[-1.2, 1.0], rosenbrock);
        for (point, want) in points.iter().zip(want) {
            assert!(point.iter().zip(want).all(|(p, w)| (p - w).abs() < 1e-12), "{point:?} {want:?}");
        }
        let state = machine.state();
        assert_eq!((points.len() as u64, state.func_evals, state.n_iter), (evals, evals, iterations));
    }
}

#[test]
fn a_search_may_use_one_evaluation_more_than_the_limit() {
    let settings = Settings { max_iter: 1, max_eval: 5, ..searching() };
    assert_eq!(step(&mut Lbfgs::default(), &settings, &[0.0; 3], ramp).len(), 6);
}

#[test]
fn the_first_step_is_short_along_the_gradient() {
    fn second<M: Method<Host<f64>>>(settings: &Settings<M::Options>) -> Vec<f64> {
        let settings = Settings { lr: 0.5, ..settings.clone() };
        step(&mut Descent::<Host<f64>, M>::default(), &settings, &[3.0, -1.0], |x, g| {
            g.copy_from_slice(x);
            0.5 * linear::dot(SERIAL, x, x)
        })[1]
            .clone()
    }
    // g = (3, −1), so that the step is 0.5/4.
    let want = [3.0 - 0.125 * 3.0, -1.0 + 0.125];
    assert_eq!(second::<History<Host<f64>>>(&searching()), want);
    assert_eq!(second::<History<Host<f64>>>(&patient()), want);
    assert_eq!(second::<super::conjugate::Cycle>(&patient()), want);
}

#[test]
fn minima_are_found() {
    // Where the loss is flat to its last bits, along the quadratic's lightest axis, a minimum is wide.
    for (f, n, x, near) in [
        (rosenbrock as Function, 2, start(2), 1e-6),
        (rosenbrock, 100, vec![0.0; 100], 1e-6),
        (quadratic, 50, vec![0.0; 50], 1e-3),
    ] {
        let ten = Settings { method: Options { history_size: 10, strong_wolfe: true }, ..searching() };
        let (mut by_lbfgs, mut by_cg) = (Lbfgs::default(), ConjugateGradient::default());
        step(&mut by_lbfgs, &ten, &x, f);
        step(&mut by_cg, &patient(), &x, f);
        for end in [by_lbfgs.point(), by_cg.point()] {
            assert!(end.len() == n && distance_to_one(end) < near, "{n}: {}", distance_to_one(end));
        }
    }
}

#[test]
fn a_valley_is_descended_in_f32_and_without_search() {
    let in_f32 = |x: &[f32], g: &mut [f32]| {
        let (wide, mut wide_g): (Vec<f64>, _) = (x.iter().map(|&x| x.into()).collect(), vec![0.0; x.len()]);
        let loss = rosenbrock(&wide, &mut wide_g);
        g.iter_mut().zip(wide_g).for_each(|(g, wide)| *g = wide as f32);
        loss
    };
    let mut machine = Lbfgs::default();
    step(&mut machine, &searching(), &[-1.2f32, 1.0], in_f32);
    assert!(machine.point().iter().all(|x| (x - 1.0).abs() < 1e-3));
    let mut machine = Lbfgs::default();
    step(&mut machine, &Settings { lr: 0.1, ..patient() }, &start(2), rosenbrock);
    assert!(distance_to_one(machine.point()) < 1e-6);
}

/// Gauss elimination with pivots.
fn solve(mut a: Vec<Vec<f64>>, mut b: Vec<f64>) -> Vec<f64> {
    let n = b.len();
    for i in 0..n {
        let pivot = (i..n).max_by(|&j, &k| a[j][i].abs().total_cmp(&a[k][i].abs())).unwrap();
        a.swap(i, pivot);
        b.swap(i, pivot);
        for j in i + 1..n {
            let factor = a[j][i] / a[i][i];
            b[j] -= factor * b[i];
            let (above, below) = a.split_at_mut(j);
            below[0].iter_mut().zip(&above[i]).skip(i).for_each(|(x, pivot)| *x -= factor * pivot);
        }
    }
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|k| a[i][k] * b[k]).sum();
        b[i] = (b[i] - known) / a[i][i];
    }
    b
}

#[test]
fn least_squares_ends_at_the_normal_equations_solution() {
    let (rows, n) = (40, 6);
    let design = |i: usize, j: usize| libm::sin((i * (j + 1)) as f64 * 0.37 + j as f64);
    let target = |i: usize| libm::cos(i as f64) + 0.1 * i as f64;
    let normal =
        (0..n).map(|j| (0..n).map(|k| (0..rows).map(|i| design(i, j) * design(i, k)).sum()).collect()).collect();
    let want = solve(normal, (0..n).map(|j| (0..rows).map(|i| design(i, j) * target(i)).sum()).collect());
    let f = |x: &[f64], g: &mut [f64]| {
        g.fill(0.0);
        (0..rows).fold(0.0, |loss, i| {
            let residual = (0..n).map(|j| design(i, j) * x[j]).sum::<f64>() - target(i);
            (0..n).for_each(|j| g[j] += residual * design(i, j));
            loss + 0.5 * residual * residual
        })
    };
    let (mut by_lbfgs, mut by_cg) = (Lbfgs::default(), ConjugateGradient::default());
    step(&mut by_lbfgs, &searching(), &vec![0.0; n], f);
    step(&mut by_cg, &patient(), &vec![0.0; n], f);
    for end in [by_lbfgs.point(), by_cg.point()] {
        assert!(end.iter().zip(&want).all(|(x, want)| (x - want).abs() < 1e-7), "{end:?} {want:?}");
    }
}

/// Steps at multiples of `every` are begun, abandoned and begun again from a copy of the state.
fn steps<M: Method<Host<f64>>>(settings: &Settings<M::Options>, every: usize) -> (Vec<f64>, Descent<Host<f64>, M>) {
    let (mut machine, mut x) = (Descent::<Host<f64>, M>::default(), start(10));
    for i in 0..12 {
        if i % every == 0 {
            machine.begin(settings, x.clone()).unwrap();
            let mut g = vec![0.0; x.len()];
            for _ in 0..3 {
                let loss = rosenbrock(machine.point(), &mut g);
                assert_eq!(machine.tell(loss, &g[..]), Ask::Evaluate);
            }
            machine = machine.state().clone().into();
        }
        step(&mut machine, settings, &x, rosenbrock);
        x = machine.point().to_vec();
    }
    (x, machine)
}

#[test]
fn an_abandoned_step_and_a_resumed_state_change_no_bit() {
    fn check<M: Method<Host<f64>> + PartialEq>(settings: &Settings<M::Options>) {
        let settings = Settings { max_iter: 4, max_eval: 9, ..settings.clone() };
        let (x, machine) = steps::<M>(&settings, 100);
        let (again, resumed) = steps::<M>(&settings, 3);
        assert_eq!(x, again);
        assert_eq!(machine.state(), resumed.state());
    }
    check::<History<Host<f64>>>(&searching());
    check::<History<Host<f64>>>(&Settings { lr: 0.01, ..patient() });
    check::<super::conjugate::Cycle>(&patient());
}

#[test]
fn a_wall_of_nan_is_not_crossed() {
    fn check<M: Method<Host<f64>>>(settings: &Settings<M::Options>) {
        let mut machine = Descent::<Host<f64>, M>::default();
        let points = step(&mut machine, settings, &start(2), nan_wall);
        assert!(points.iter().any(|x| x[0] > 0.5), "the wall was met");
        assert!(loss(nan_wall, machine.point()) < 0.5, "{:?}", machine.point());
    }
    let settings = Settings { max_iter: 100, max_eval: 200, ..searching() };
    check::<History<Host<f64>>>(&settings);
    check::<super::conjugate::Cycle>(&Settings { max_iter: 100, max_eval: 200, ..patient() });
    // Without search a bad step is taken back, and a tenth of it tried.
    let mut machine = Lbfgs::default();
    let settings = Settings { max_iter: 3, max_eval: 9, lr: 1e6, ..patient() };
    let points = step(&mut machine, &settings, &[0.4, 0.0], |x, g| {
        g.copy_from_slice(&[-1.0, 0.0]);
        if x[0] > 0.5 { f64::NAN } else { -x[0] }
    });
    let tenths = points[1..].windows(2).take(7).all(|p| ((p[0][0] - 0.4) / (p[1][0] - 0.4) - 10.0).abs() < 1e-3);
    assert!(tenths && machine.point()[0] > 0.4 && machine.point()[0] <= 0.5, "{points:?}");
}

#[test]
fn a_first_evaluation_that_is_not_finite_changes_counters_only() {
    let mut machine = Lbfgs::default();
    step(&mut machine, &Settings { max_iter: 3, ..searching() }, &start(2), rosenbrock);
    let before = machine.state().clone();
    for (loss, g) in [(f64::NAN, 1.0), (f64::NEG_INFINITY, 1.0), (1.0, f64::NAN), (1.0, f64::INFINITY)] {
        let mut machine: Lbfgs<f64> = before.clone().into();
        machine.begin(&searching(), vec![1.0, 2.0]).unwrap();
        assert_eq!(machine.tell(loss, [0.5, g]), Ask::Done);
        assert_eq!(machine.point()[..], [1.0, 2.0]);
        assert_eq!(machine.first_loss().to_bits(), loss.to_bits());
        let mut counted = before.clone();
        counted.func_evals += 1;
        assert_eq!(machine.state(), &counted);
    }
    let mut machine = Lbfgs::<f64>::default();
    machine.begin(&searching(), vec![1.0, 2.0]).unwrap();
    assert_eq!(machine.tell(1.0, [0.5]), Ask::Done);
    assert_eq!(machine.tell(1.0, [0.5, 0.5]), Ask::Done);
    assert_eq!(Lbfgs::<f32>::default().tell(0.0, []), Ask::Done);
}

#[test]
fn nothing_moves_at_a_minimum_nor_without_elements() {
    let mut machine = Lbfgs::default();
    assert_eq!(step(&mut machine, &searching(), &[1.0, 1.0], rosenbrock).len(), 1);
    assert_eq!(machine.state().last, None);
    assert_eq!(step(&mut Lbfgs::<f64>::default(), &searching(), &[], |_, _| 1.0).len(), 1);
    assert_eq!(step(&mut ConjugateGradient::<f64>::default(), &patient(), &[], |_, _| 1.0).len(), 1);
}

#[test]
fn states_of_another_shape_are_refused() {
    let mut machine = Lbfgs::default();
    step(&mut machine, &Settings { max_iter: 3, ..searching() }, &start(2), rosenbrock);
    let message = |machine: &mut Lbfgs<f64>, n| machine.begin(&searching(), vec![0.0; n]).unwrap_err().to_string();
    assert_eq!(message(&mut machine, 3), "LBFGS: the point must be of 2 elements, got 3");

    let parts = || -> BTreeMap<_, _> { machine.state().parts(&searching().method).into_iter().map(named).collect() };
    let read = |values| lbfgs::State::from_parts(Parts::new("LBFGS", 2, values));
    assert_eq!(&read(parts()).unwrap(), machine.state());
    let vectors = |lengths: &[usize]| Part::List(lengths.iter().map(|&n| Part::Vector(vec![0.5; n].into())).collect());
    type Changed = Option<Part<Host<f64>>>;
    let cases: [(&str, Changed, &str); 12] = [
        ("func_evals", None, "func_evals must be present, got none"),
        ("n_iter", Some(Part::Number(-1.0)), "n_iter must be a whole number >= 0, got -1"),
        ("t", Some(Part::Number(f64::NAN)), "t must be a finite number, got NaN"),
        ("t", Some(Part::None), "t must be a number, got None"),
        ("d", Some(Part::Vector([0.0; 3].into())), "d must be of 2 elements, got 3"),
        ("prev_flat_grad", Some(Part::Count(2)), "prev_flat_grad must be an array, got a number"),
        ("old_dirs", Some(vectors(&[2, 3])), "old_dirs[1] must be of 2 elements, got 3"),
        ("old_stps", Some(vectors(&[2])), "old_stps must be as long as old_dirs (2), got length 1"),
        ("ro", Some(Part::List(vec![])), "ro must be as long as old_dirs (2), got length 0"),
        ("ro", Some(Part::Number(1.0)), "ro must be a list, got a number"),
        ("al", Some(Part::List(vec![Part::Number(f64::INFINITY)])), "al[0] must be a finite number, got inf"),
        (
            "since_restart",
            Some(Part::Count(1)),
            "state key must be one of func_evals, n_iter, d, t, prev_flat_grad, prev_loss, old_dirs, old_stps, ro, H_diag, al, got since_restart",
        ),
    ];
    for (name, value, want) in cases {
        let mut values = parts();
        match value {
            Some(value) => values.insert(name.into(), value),
            None => values.remove(name),
        };
        assert_eq!(read(values).unwrap_err().to_string(), format!("LBFGS: {want}"));
    }
}

fn named<F>((name, part): (&str, Part<F>)) -> (String, Part<F>) {
    (name.to_owned(), part)
}

/// Steps of lr without search run into a wall of NaN at the last iteration of a step, which is not evaluated.
#[test]
fn a_step_that_ended_where_nothing_is_finite_goes_back() {
    let settings = Settings { lr: 0.5, max_iter: 1, ..Settings::<Options>::default() };
    let wall = |x: &[f64], g: &mut [f64]| {
        g[0] = -1.0;
        if x[0] > 0.3 { f64::NAN } else { -x[0] }
    };
    let mut machine = Lbfgs::default();
    step(&mut machine, &settings, &[0.0], wall);
    assert_eq!(machine.point()[..], [0.5]);
    let x = machine.point().to_vec();
    let points = step(&mut machine, &settings, &x, wall);
    assert!(points.len() == 2 && points[0] == [0.5] && (points[1][0] - 0.05).abs() < 1e-15, "{points:?}");
    assert!(machine.state().last.as_ref().is_some_and(|last| last.prev_loss == -points[1][0]));

    // Resumed from its parts it does the same.
    let mut first = Lbfgs::default();
    step(&mut first, &settings, &[0.0], wall);
    let parts = first.state().parts(&settings.method).into_iter().map(named).collect();
    let state = lbfgs::State::from_parts(Parts::new("LBFGS", 1, parts)).unwrap();
    let mut second = Lbfgs::from(state.with_unseen_end(first.state().unseen_end()));
    assert_eq!(step(&mut second, &settings, &x, wall), points);

    // Elsewhere, or after an end that was evaluated, a point that is not finite stays where it is.
    assert_eq!(step(&mut first, &settings, &[0.6], wall).len(), 1);
    assert_eq!(step(&mut second, &settings, &[0.5], wall).len(), 1);

    // Where nothing is finite any more it ends where it began, within its evaluations.
    let mut lost = Lbfgs::default();
    step(&mut lost, &settings, &[0.0], wall);
    let few = Settings { max_eval: 5, ..settings };
    assert_eq!(step(&mut lost, &few, &x, |_, _| f64::NAN).len(), 5);
    assert_eq!(lost.point()[..], [0.5]);
}

#[test]
fn a_smaller_history_forgets_the_oldest() {
    let (mut machine, mut x) = (Lbfgs::default(), start(10));
    for (history_size, pairs) in [(5, 5), (2, 2), (0, 1), (3, 3)] {
        let method = Options { history_size, strong_wolfe: true };
        step(&mut machine, &Settings { max_iter: 8, method, ..searching() }, &x, rosenbrock);
        x = machine.point().to_vec();
        let memory = &machine.state().memory;
        assert_eq!((memory.pairs.len(), memory.al.len()), (pairs, pairs));
    }
}

/// Each direction is held against the definition, each step against the conditions.
#[test]
fn conjugate_directions_follow_the_book() {
    let (mut machine, mut x) = (ConjugateGradient::default(), start(10));
    let settings = Settings { max_iter: 1, max_eval: 50, ..patient() };
    let plain_dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let (mut conjugate, mut since) = (0, 0);
    for i in 0..60 {
        let last = machine.state().last.clone();
        let mut g = vec![0.0; 10];
        let f0 = rosenbrock(&x, &mut g);
        step(&mut machine, &settings, &x, rosenbrock);
        let now = machine.state().last.clone().unwrap();
        let mut want: Vec<f64> = g.iter().map(|g| -g).collect();
        since += 1;
        if let Some(last) = last {
            let y: Vec<f64> = g.iter().zip(&*last.prev_flat_grad).map(|(g, p)| g - p).collect();
            let beta = plain_dot(&g, &y) / plain_dot(&last.prev_flat_grad, &last.prev_flat_grad);
            let orthogonal = plain_dot(&g, &last.prev_flat_grad).abs() < 0.2 * plain_dot(&g, &g);
            let d: Vec<f64> = want.iter().zip(&*last.d).map(|(g, d)| g + beta * d).collect();
            if beta > 0.0 && orthogonal && since < 10 && plain_dot(&d, &g) < 0.0 {
                (want, conjugate) = (d, conjugate + 1);
            } else {
                since = 0;
            }
        } else {
            since = 0;
        }
        let scale = largest(&want);
        assert!(now.d.iter().zip(&want).all(|(d, w)| (d - w).abs() < 1e-9 * scale), "{i}");
        assert_eq!(machine.state().memory.since_restart, since);

        x = machine.point().to_vec();
        let (slope0, mut g1) = (plain_dot(&g, &now.d), vec![0.0; 10]);
        let f1 = rosenbrock(&x, &mut g1);
        assert!(f1 <= f0 + 1e-4 * now.t * slope0, "{i}");
        assert!(plain_dot(&g1, &now.d).abs() <= -0.1 * slope0 * (1.0 + 1e-9), "{i}");
    }
    assert!(conjugate > 10, "{conjugate}");
}

#[test]
fn a_search_bisects_towards_its_finite_end() {
    let trial =
        |t: f64, loss: f64, slope: f64| Trial { t, loss, slope, gradient: Host::from([slope]), steepest: slope.abs() };
    let rules = Rules { decrease: 1e-4, curvature: 0.9, max_ls: 25, min_change: 1e-9 };
    let mut search = Search::new(rules, trial(0.0, 1.0, -1.0), 1.0, 1.0);
    for want in [0.5, 0.25, 0.125] {
        assert!(search.tell(trial(search.t(), f64::INFINITY, f64::NAN)).is_none());
        assert_eq!(search.t(), want);
    }
    assert_eq!(search.tell(trial(0.125, 0.9, -0.5)).unwrap().t, 0.125);

    let mut search = Search::new(Rules { max_ls: 4, ..rules }, trial(0.0, 1.0, -1.0), 1.0, 1.0);
    let found = (0..5).find_map(|_| search.tell(trial(search.t(), f64::INFINITY, f64::NAN)));
    assert_eq!(found.unwrap().t, 0.0);
}

fn settings<O>(method: O) -> impl Strategy<Value = Settings<O>>
where
    O: Clone + std::fmt::Debug,
{
    let tolerance = || prop_oneof![Just(0.0), Just(1e-9), Just(1e-3)];
    let lr = prop_oneof![Just(0.0), Just(1.0), 1e-4..20.0, Just(1e30)];
    (lr, 0u64..40, 1u64..60, tolerance(), tolerance()).prop_map(move |(lr, max_iter, max_eval, grad, change)| {
        Settings { lr, max_iter, max_eval, tolerance_grad: grad, tolerance_change: change, method: method.clone() }
    })
}

/// A few steps on any function: within the limit, finite, and with search never uphill.
fn holds_everywhere<M: Method<Host<f64>>>(f: Function, settings: &Settings<M::Options>, x: &[f64]) {
    let (mut machine, mut x) = (Descent::<Host<f64>, M>::default(), x.to_vec());
    for _ in 0..3 {
        let before = loss(f, &x);
        let evals = step(&mut machine, settings, &x, f).len() as u64;
        assert!(evals <= settings.max_eval + 1, "{evals}");
        x = machine.point().to_vec();
        assert!(largest(&x).is_finite());
        if M::searches(&settings.method) && before.is_finite() {
            assert!(loss(f, &x) <= before);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn any_settings_on_any_function(
        f in prop::sample::select(FUNCTIONS),
        common in settings(()),
        history_size in 0usize..5,
        strong_wolfe: bool,
        restart in prop::option::of(0u64..5),
        x in prop::collection::vec(-2.0..2.0, 1..6),
    ) {
        let with = |lr| Settings { lr, ..common };
        let Settings { lr, max_iter, max_eval, tolerance_grad, tolerance_change, .. } = with(common.lr);
        let method = Options { history_size, strong_wolfe };
        let lbfgs = Settings { lr, max_iter, max_eval, tolerance_grad, tolerance_change, method };
        holds_everywhere::<History<Host<f64>>>(f, &lbfgs, &x);
        let method = super::conjugate::Options { restart };
        let cg = Settings { lr, max_iter, max_eval, tolerance_grad, tolerance_change, method };
        holds_everywhere::<super::conjugate::Cycle>(f, &cg, &x);
    }

    /// Answers that belong to no function, in f32 where numbers overflow early.
    #[test]
    fn any_answers(
        common in settings(Options { history_size: 3, strong_wolfe: true }),
        strong_wolfe: bool,
        answers in prop::collection::vec((any::<f64>(), prop::array::uniform3(any::<f32>())), 1..50),
        mild in prop::collection::vec((-1.0..1.0, prop::array::uniform3(-1.0f32..1.0)), 1..50),
    ) {
        let settings = Settings { method: Options { strong_wolfe, ..common.method }, ..common };
        let cg = Settings { method: super::conjugate::Options::default(), ..patient() };
        let cg = Settings { max_iter: settings.max_iter, max_eval: settings.max_eval, ..cg };
        for answers in [answers, mild] {
            let mut next = answers.iter().cycle();
            let mut f = |_: &[f32], g: &mut [f32]| {
                let (loss, gradient) = next.next().unwrap();
                g.copy_from_slice(gradient);
                *loss
            };
            let mut machine = Lbfgs::<f32>::default();
            let evals = step(&mut machine, &settings, &[1.0, 2.0, 3.0], &mut f).len() as u64;
            prop_assert!(evals <= settings.max_eval + 1 && largest(machine.point()).is_finite());
            let mut machine = ConjugateGradient::<f32>::default();
            let evals = step(&mut machine, &cg, &[1.0, 2.0, 3.0], &mut f).len() as u64;
            prop_assert!(evals <= cg.max_eval + 1 && largest(machine.point()).is_finite());
        }
    }
}
