// The second pass of the guard: one workgroup for all chunks.

const NOT_A_NUMBER: u32 = 0x7fc00000u;
const ONE: u32 = 0x3f800000u;
// That of an infinite bound.
const UNBOUNDED_EXPONENT: i32 = 1000;

// The bits of x·2^e where that is below the smallest normal number: a whole number of 2^-149, rounded once.
fn bits_below_normal(x: Double, e: i32) -> u32 {
    let hi = scaled(x.hi.x, e + 149);
    let lo = scaled(x.lo.x, e + 149);
    let whole = floor(hi);
    let rest = opaque(vec4<f32>(hi - whole)).x;
    // What hi does not hold decides where it is halfway between two; else the even one does.
    let from_half = (rest - 0.5) + lo;
    let is_odd = (u32(whole) & 1u) == 1u;
    return u32(whole) + select(0u, 1u, from_half > 0.0 || (from_half == 0.0 && is_odd));
}

// The bits of max_norm/(norm + 1e-6) for a norm of √sum·2^exponent, at most 1.
fn clip_factor(control: Control, sum: Double, exponent: i32) -> u32 {
    // Both terms are brought to one exponent, which keeps the constant small enough.
    let base = max(exponent, -20);
    let epsilon = double_scaled(Double(vec4<f32>(control.epsilon_hi), vec4<f32>(control.epsilon_lo)), -base);
    let divisor = add(double_scaled(root(sum), exponent - base), epsilon);
    let quotient = divided(Double(vec4<f32>(control.max_hi), vec4<f32>(control.max_lo)), divisor);
    let factor_exponent = control.max_exponent - base;
    if (quotient.hi.x > 0.0 && exponent_of(bitcast<u32>(quotient.hi.x)) + factor_exponent < -126) {
        return bits_below_normal(quotient, factor_exponent);
    }
    return bitcast<u32>(min(scaled(quotient.hi.x, factor_exponent), 1.0));
}

@compute @workgroup_size(WORKGROUP)
fn decide(@builtin(local_invocation_index) lane: u32) {
    let control = work.control;
    unseen_zero = control.zero;
    var found = 0u;
    // Shifted, so that the lanes' largest is one of unsigned numbers.
    var largest = 0u;
    for (var i = lane; i < control.chunks; i += WORKGROUP) {
        found |= partials[i].found;
        largest = max(largest, select(0u, u32(partials[i].exponent + 200), partials[i].hi > 0.0));
    }
    found = any_of_lanes(lane, found);
    let scaled_exponent = i32(largest_of_lanes(lane, largest)) - 200;
    let exponent = scaled_exponent - control.scale_exponent;
    var sum = double(vec4<f32>(0.0));
    for (var i = lane; i < control.chunks; i += WORKGROUP) {
        let partial = partials[i];
        let one = Double(vec4<f32>(partial.hi, 0.0, 0.0, 0.0), vec4<f32>(partial.lo, 0.0, 0.0, 0.0));
        sum = add(sum, double_scaled(one, 2 * (partial.exponent - scaled_exponent)));
    }
    let total = sum_of_lanes(lane, sum);
    if (lane != 0u) {
        return;
    }
    work.control.found = found;
    if ((control.switches & SKIPS) != 0u && found != 0u) {
        work.control.skip = 1u;
    }
    if ((control.switches & CLIPS_NORM) == 0u) {
        return;
    }
    let norm = root(total);
    work.control.norm_hi = norm.hi.x;
    work.control.norm_lo = norm.lo.x;
    work.control.norm_exponent = exponent;
    if ((found & HAS_NAN) != 0u) {
        work.control.factor = NOT_A_NUMBER;
    } else if ((found & HAS_INFINITY) != 0u && (control.switches & BOUNDED) == 0u) {
        // A finite bound over an infinite norm; an infinite one clips nothing.
        work.control.factor = select(0u, ONE, control.max_exponent >= UNBOUNDED_EXPONENT);
    } else {
        work.control.factor = clip_factor(control, total, exponent);
    }
}
