// Twin of src/rules/rmsprop.rs.

struct Scalars {
    // α.
    alpha: f32,
    // 1 − α.
    one_minus_alpha: f32,
    // ε.
    eps: f32,
    // μ.
    momentum: f32,
    // −lr.
    neg_lr: f32,
}

fn root(c: Scalars, g: vec4<f32>, v: ptr<function, vec4<f32>>) -> vec4<f32> {
    *v = *v * c.alpha + (c.one_minus_alpha * g) * g;
    return sqrt(*v) + c.eps;
}

fn centered_root(
    c: Scalars,
    g: vec4<f32>,
    v: ptr<function, vec4<f32>>,
    mean: ptr<function, vec4<f32>>,
) -> vec4<f32> {
    *v = *v * c.alpha + (c.one_minus_alpha * g) * g;
    *mean = lerp(*mean, g, c.one_minus_alpha);
    let variance = *v - *mean * *mean;
    return sqrt(select(variance, vec4<f32>(0.0), variance < vec4<f32>(0.0))) + c.eps;
}

fn descend(c: Scalars, p: vec4<f32>, g: vec4<f32>, a: vec4<f32>) -> vec4<f32> {
    return p + (c.neg_lr * g) / a;
}

fn descend_with_momentum(
    c: Scalars,
    p: vec4<f32>,
    g: vec4<f32>,
    a: vec4<f32>,
    b: ptr<function, vec4<f32>>,
) -> vec4<f32> {
    *b = *b * c.momentum + g / a;
    return p + c.neg_lr * *b;
}

// Neither momentum nor centered.
fn rmsprop(c: Scalars, p: vec4<f32>, g: vec4<f32>, v: ptr<function, vec4<f32>>) -> vec4<f32> {
    let a = root(c, g, v);
    return descend(c, p, g, a);
}

// With momentum.
fn rmsprop_momentum(
    c: Scalars,
    p: vec4<f32>,
    g: vec4<f32>,
    v: ptr<function, vec4<f32>>,
    b: ptr<function, vec4<f32>>,
) -> vec4<f32> {
    let a = root(c, g, v);
    return descend_with_momentum(c, p, g, a, b);
}

// Centered.
fn rmsprop_centered(
    c: Scalars,
    p: vec4<f32>,
    g: vec4<f32>,
    v: ptr<function, vec4<f32>>,
    mean: ptr<function, vec4<f32>>,
) -> vec4<f32> {
    let a = centered_root(c, g, v, mean);
    return descend(c, p, g, a);
}

// Centered, with momentum.
fn rmsprop_centered_momentum(
    c: Scalars,
    p: vec4<f32>,
    g: vec4<f32>,
    v: ptr<function, vec4<f32>>,
    b: ptr<function, vec4<f32>>,
    mean: ptr<function, vec4<f32>>,
) -> vec4<f32> {
    let a = centered_root(c, g, v, mean);
    return descend_with_momentum(c, p, g, a, b);
}
